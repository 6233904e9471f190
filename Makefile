# Everything sets itself up: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
# The oldest supported torch, and the one that IPEX needs; its only build is the CUDA one.
IPEX_VENV := .venv-ipex
IPEX_TORCH := 2.8.0
IPEX := 2.8.0
IPEX_GIGABYTES := 9

.PHONY: help demo demo-tuning demo-cnn test test-core test-ipex test-zoo check format bench bench-ipex clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | sort

$(VENV)/ready: setup.cfg
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q torch==$(TORCH)
	$(BIN)/python -m pip install -q torch==$(TORCH) -e '.[examples,dev]'
	touch $@

$(IPEX_VENV)/ready: setup.cfg
	@test "$$(uname -s) $$(uname -m)" = "Linux x86_64" || { \
	  echo "IPEX is for x86 Linux, this is $$(uname -sm): run 'make test' on such a machine," \
	    "or 'make test-core' for all but IPEX"; exit 1; }
	@test $$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}') -ge $(IPEX_GIGABYTES) || { \
	  echo "torch $(IPEX_TORCH) and IPEX $(IPEX) need $(IPEX_GIGABYTES) GB of disk here," \
	    "there are $$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}'): make room," \
	    "or run 'make test-core' for all but IPEX"; exit 1; }
	test -x $(IPEX_VENV)/bin/python || $(PYTHON) -m venv $(IPEX_VENV)
	$(IPEX_VENV)/bin/python -m pip install -q --upgrade pip
	$(IPEX_VENV)/bin/python -m pip install -q torch==$(IPEX_TORCH)
	$(IPEX_VENV)/bin/python -m pip install -q torch==$(IPEX_TORCH) \
	  intel-extension-for-pytorch==$(IPEX) -e '.[examples,dev]'
	touch $@

demo: $(VENV)/ready  ## quantize the pretrained all-MiniLM-L6-v2 and compare it with float
	OMP_NUM_THREADS=1 $(BIN)/python examples/minilm_ptq.py

demo-tuning: $(VENV)/ready  ## find the layers of all-MiniLM-L6-v2 that int8 hurts, and tune
	OMP_NUM_THREADS=1 $(BIN)/python examples/minilm_tuning.py

demo-cnn: $(VENV)/ready  ## train a small CNN on scikit-learn's digits and quantize it
	OMP_NUM_THREADS=1 $(BIN)/python examples/digits_cnn_ptq.py

test: test-core test-ipex  ## the whole suite, on the newest torch and on the oldest with IPEX

test-core: $(VENV)/ready  ## the whole suite on torch $(TORCH)
	$(BIN)/python -m pytest -n 2

test-ipex: $(IPEX_VENV)/ready  ## the whole suite on torch $(IPEX_TORCH), IPEX $(IPEX) included
	$(IPEX_VENV)/bin/python -m pytest -n 2

test-zoo: $(VENV)/ready $(IPEX_VENV)/ready  ## every architecture as ONNX file and on IPEX; `make test` takes one of each kind
	ALL_ARCHITECTURES=1 $(BIN)/python -m pytest -n 2 tests/test_onnx_zoo.py
	ALL_ARCHITECTURES=1 $(IPEX_VENV)/bin/python -m pytest -n 2 tests/test_ipex_zoo.py tests/test_zoo.py

check: $(VENV)/ready  ## lint, types and the smoke tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_tiny.py

format: $(VENV)/ready  ## put every file in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/ready  ## latency, calibration cost and sensitivity ranking; writes benchmarks/results/
	taskset -c 0 env OMP_NUM_THREADS=1 $(BIN)/python benchmarks/latency.py
	taskset -c 0 env OMP_NUM_THREADS=1 $(BIN)/python benchmarks/calibration.py
	taskset -c 0 env OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sensitivity.py

bench-ipex: $(IPEX_VENV)/ready  ## latency on IPEX, beside IPEX's own prepare and convert
	taskset -c 0 env OMP_NUM_THREADS=1 $(IPEX_VENV)/bin/python benchmarks/latency.py --backend ipex
	taskset -c 0 env OMP_NUM_THREADS=1 $(IPEX_VENV)/bin/python benchmarks/ipex_own.py

clean:  ## remove the environments and caches
	rm -rf $(VENV) $(IPEX_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
