# Everything sets itself up: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
# The oldest supported torch, and the one that IPEX needs; its only build is the CUDA one: 7 GB.
OLD_VENV := .venv-ipex
OLD_TORCH := 2.8.0

.PHONY: help demo demo-cnn test test-core test-old test-onnx check format bench clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | sort

$(VENV)/ready: setup.cfg
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q torch==$(TORCH)
	$(BIN)/python -m pip install -q torch==$(TORCH) -e '.[examples,dev]'
	touch $@

$(OLD_VENV)/ready: setup.cfg
	test -x $(OLD_VENV)/bin/python || $(PYTHON) -m venv $(OLD_VENV)
	$(OLD_VENV)/bin/python -m pip install -q --upgrade pip
	$(OLD_VENV)/bin/python -m pip install -q torch==$(OLD_TORCH)
	$(OLD_VENV)/bin/python -m pip install -q torch==$(OLD_TORCH) -e '.[examples,dev]'
	touch $@

demo: $(VENV)/ready  ## quantize the pretrained all-MiniLM-L6-v2 and compare it with float
	OMP_NUM_THREADS=1 $(BIN)/python examples/minilm_ptq.py

demo-cnn: $(VENV)/ready  ## train a small CNN on scikit-learn's digits and quantize it
	OMP_NUM_THREADS=1 $(BIN)/python examples/digits_cnn_ptq.py

test: test-core test-old  ## the whole suite, on the newest and on the oldest torch

test-core: $(VENV)/ready  ## the whole suite on torch $(TORCH)
	$(BIN)/python -m pytest -n 2

test-old: $(OLD_VENV)/ready  ## the whole suite on torch $(OLD_TORCH)
	$(OLD_VENV)/bin/python -m pytest -n 2

test-onnx: $(VENV)/ready  ## every architecture as an ONNX file; `make test` takes one of each kind
	ALL_ARCHITECTURES=1 $(BIN)/python -m pytest -n 2 tests/test_onnx_zoo.py

check: $(VENV)/ready  ## lint, types and the smoke tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_tiny.py

format: $(VENV)/ready  ## put every file in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/ready  ## latency, calibration cost and observers on MiniLM; writes benchmarks/results/
	taskset -c 0 env OMP_NUM_THREADS=1 $(BIN)/python benchmarks/latency.py
	taskset -c 0 env OMP_NUM_THREADS=1 $(BIN)/python benchmarks/calibration.py

clean:  ## remove the environments and caches
	rm -rf $(VENV) $(OLD_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
