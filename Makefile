# Everything sets itself up: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The oldest supported torch, and the one that IPEX needs; its only build is the CUDA one.
IPEX_VENV := .venv-ipex
IPEX_GIGABYTES := 9
# The newest of everything that setup.cfg allows.
LATEST_VENV := .venv-latest
# What builds the site of docs/.
DOCS_VENV := .venv-docs
# What looks for known weaknesses of what the locks hold, and the data base that it asks.
AUDIT_VENV := .venv-audit
WEAKNESSES := https://api.osv.dev
AUDITED := core.txt torch.txt ipex.txt docs.txt llm.txt peers.txt audit.txt
# What writes the locks. It resolves for every platform and Python at once, hashes included.
LOCK_VENV := .venv-lock
UV := 0.13.9
EXTRAS := --extra examples --extra dev
COMPILE := $(LOCK_VENV)/bin/uv pip compile --quiet --universal --python-version 3.10 \
  --no-annotate --custom-compile-command 'make lock' $(if $(UPGRADE),--upgrade)
# What only some builds of torch need stands in torch.txt alone (see requirements/torch.in).
CUDA := s/^(torch|triton|cuda-[^=]*|nvidia-[^=]*)==.*/--no-emit-package \1/p
# A language model and what reads its file, apart from the environment (see requirements/llm.in).
LLM := out/llm-packages
# Other tools whose int8 is measured beside ours, likewise (see requirements/peers.in).
PEERS := out/peer-packages
# Weights and a further tool for the accuracy table, likewise (see requirements/accuracy.in).
ACCURACY := out/accuracy-packages
# Nothing but what the locks list, and no other build tools than theirs. Python compiles what it
# imports; all of torch takes half a minute.
INSTALL := -m pip install --quiet --no-deps --no-compile
# Installing builds them beside the package, for every environment.
KERNELS := $(wildcard csrc/*)
# Python's bytecode is kept, for all environments: an import of torch takes three times as long
# without, and the tests start many processes.
export PYTHONDONTWRITEBYTECODE :=
export PYTHONPYCACHEPREFIX := $(CURDIR)/.venv-bytecode
# Tests of one file stay together as far as possible, since they capture the same models.
PYTEST := -m pytest -n 2 --dist worksteal
# What `make test` leaves to the newest torch: arithmetic, bookkeeping, files, training and rules on the source, which depend
# on it least. All else runs on the oldest too, as do new files: captures, what is done with the operators in them, saved
# graphs, kernels, traces and IPEX. `make test-long` leaves out nothing.
SAME := algorithms checkpoints cli core extensions fuzz integrations migrate native rounding sequences statistics tuning \
  $(addprefix amp/test_,allocation.py amp_changes.py amp_infinite_gradient.py amp_loss.py amp_recording.py amp_scores.py \
  amp_without_gradient.py optimizing.py fallback_bad_input.py fallback_selection.py fallback_state.py gram.py groups.py padding.py probe_sites.py \
  ranking.py selection.py sensitivity_report.py) \
  $(addprefix backends/test_,embedding_bags.py float_and_dynamic.py formats.py in_process.py in_process_limits.py names.py \
  onednn_native.py onnx.py onnx_forms.py onnx_grids.py) \
  $(addprefix convert/test_,lending.py load_state_dict.py looked_at.py nested.py ownership.py straight.py) \
  $(addprefix graph/test_,annotate.py macs.py rules.py sites.py) \
  $(addprefix io/test_,files.py kinds_of_paths.py onnx_parts.py onnx_recurrent.py onnx_rewrites.py onnx_sizes.py onnx_weights.py saved_data.py saved_models.py \
  saved_models_refused.py \
  saved_quantizers.py summary.py summary_mistakes.py) \
  $(addprefix passes/test_,constants.py fold_batch_norm.py fold_pads.py fold_scales.py \
  functionalize.py identity.py insert_qdq.py insert_qdq_weights.py keywords.py lower_precision.py \
  pass_base.py prepare.py smoothing.py) \
  $(addprefix qat/test_qat_,adapters.py bad_input.py batch_norm.py digits.py distillation.py distributed.py dropout.py \
  edges.py gradients.py lightning.py observing.py tables.py trainer.py training.py transforms.py tuning.py \
  sharing.py starts.py) \
  $(addprefix test_,accuracy_table.py all_reduce.py architecture.py bad_input.py benchmarks.py bfloat16.py capture_policy.py capturing_once.py configuration.py contributing.py \
  coverage.py decoding_zoo.py experts.py experts_with_data.py explain.py generate_llm.py merging.py misspelt.py mistakes.py never_slower.py \
  onnx_pretrained.py onnx_steps.py onnx_zoo.py public.py quantizer.py ray.py readme.py recipes.py release.py report.py requirements.py \
  saved_states.py thinning.py troubleshooting.py typing.py unseen_calls.py)

# The same, but for their tests on IPEX.
ONLY_IPEX := $(addprefix tests/,amp/test_amp_outputs.py amp/test_fallback_execution.py test_example_inputs.py test_invariants.py)

.PHONY: help lock demo demo-tuning demo-cnn demo-qat demo-llm test test-core test-ipex test-latest test-long test-zoo test-sequences fuzz check format bench bench-ipex bench-peers bench-memory bench-accuracy bench-zoo bench-llm docs audit clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | sort

$(VENV)/ready: requirements/core.txt requirements/torch.txt setup.py setup.cfg $(KERNELS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --require-hashes -r requirements/core.txt
	$(BIN)/python -m pip install --quiet --no-compile -c requirements/torch.txt -r requirements/torch.in
	$(BIN)/python $(INSTALL) --no-build-isolation -e .
	$(BIN)/python -m pip check
	touch $@

$(IPEX_VENV)/ready: requirements/ipex.txt setup.py setup.cfg $(KERNELS)
	@test "$$(uname -s) $$(uname -m)" = "Linux x86_64" || { \
	  echo "IPEX is for x86 Linux, this is $$(uname -sm): run 'make test' on such a machine," \
	    "or 'make test-core' for all but IPEX"; exit 1; }
	@test $$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}') -ge $(IPEX_GIGABYTES) || { \
	  echo "torch 2.8 and IPEX 2.8 need $(IPEX_GIGABYTES) GB of disk here," \
	    "there are $$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}'): make room," \
	    "or run 'make test-core' for all but IPEX"; exit 1; }
	test -x $(IPEX_VENV)/bin/python || $(PYTHON) -m venv $(IPEX_VENV)
	$(IPEX_VENV)/bin/python $(INSTALL) --require-hashes -r requirements/ipex.txt
	$(IPEX_VENV)/bin/python $(INSTALL) --no-build-isolation -e .
	$(IPEX_VENV)/bin/python -m pip check
	touch $@

$(LOCK_VENV)/ready:
	test -x $(LOCK_VENV)/bin/python || $(PYTHON) -m venv $(LOCK_VENV)
	$(LOCK_VENV)/bin/python -m pip install --quiet uv==$(UV)
	touch $@

lock: $(LOCK_VENV)/ready  ## lock what setup.cfg and requirements/*.in ask for; UPGRADE=1 moves every version
	$(COMPILE) requirements/torch.in -o requirements/torch.txt
	$(COMPILE) --generate-hashes $(EXTRAS) requirements/core.in setup.cfg -o requirements/core.txt \
	  -c requirements/torch.txt $$(sed -nE '$(CUDA)' requirements/torch.txt | sort -u)
	$(COMPILE) --generate-hashes $(EXTRAS) requirements/ipex.in setup.cfg -o requirements/ipex.txt
	$(COMPILE) --generate-hashes --no-deps requirements/llm.in -o requirements/llm.txt
	$(COMPILE) --generate-hashes --no-deps requirements/peers.in -o requirements/peers.txt
	$(COMPILE) --generate-hashes --no-deps requirements/accuracy.in -o requirements/accuracy.txt
	$(COMPILE) --generate-hashes requirements/docs.in -o requirements/docs.txt
	$(COMPILE) --generate-hashes requirements/audit.in -o requirements/audit.txt

$(DOCS_VENV)/ready: requirements/docs.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python $(INSTALL) --require-hashes -r requirements/docs.txt
	touch $@

docs: $(DOCS_VENV)/ready  ## the documentation as a site, out/site/index.html; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --strict

$(AUDIT_VENV)/ready: requirements/audit.txt
	test -x $(AUDIT_VENV)/bin/python || $(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/python $(INSTALL) --require-hashes -r requirements/audit.txt
	touch $@

audit: $(VENV)/ready $(AUDIT_VENV)/ready  ## licences and known weaknesses of what the locks hold
	$(BIN)/python requirements/licenses.py requirements/core.txt requirements/torch.txt
	$(AUDIT_VENV)/bin/python requirements/licenses.py requirements/audit.txt
	@if test -x $(IPEX_VENV)/bin/python; then $(IPEX_VENV)/bin/python requirements/licenses.py requirements/ipex.txt; fi
	@if test -x $(DOCS_VENV)/bin/python; then $(DOCS_VENV)/bin/python requirements/licenses.py requirements/docs.txt; fi
	@if $(AUDIT_VENV)/bin/python -c 'import requests; requests.head("$(WEAKNESSES)", timeout=20)' 2>/dev/null; then \
	  wrong=0; for lock in $(AUDITED); do echo "requirements/$$lock:"; \
	    $(AUDIT_VENV)/bin/pip-audit --vulnerability-service osv --disable-pip --no-deps -r requirements/$$lock || wrong=1; \
	  done; exit $$wrong; \
	else echo "known weaknesses were not looked up, as $(WEAKNESSES) cannot be reached from here"; fi

$(LLM)/ready: $(VENV)/ready requirements/llm.txt
	$(BIN)/python $(INSTALL) --require-hashes --upgrade --target $(LLM) -r requirements/llm.txt
	touch $@

$(PEERS)/ready: $(VENV)/ready requirements/peers.txt
	$(BIN)/python $(INSTALL) --require-hashes --upgrade --target $(PEERS) -r requirements/peers.txt
	touch $@

$(ACCURACY)/ready: $(VENV)/ready requirements/accuracy.txt
	$(BIN)/python $(INSTALL) --require-hashes --upgrade --target $(ACCURACY) -r requirements/accuracy.txt
	touch $@

demo: $(VENV)/ready  ## quantize the pretrained all-MiniLM-L6-v2 and compare it with float
	OMP_NUM_THREADS=1 $(BIN)/python examples/minilm_ptq.py

demo-tuning: $(VENV)/ready  ## find the layers of all-MiniLM-L6-v2 that int8 hurts, and tune
	OMP_NUM_THREADS=1 $(BIN)/python examples/minilm_tuning.py

demo-cnn: $(VENV)/ready  ## train a small CNN on scikit-learn's digits and quantize it
	OMP_NUM_THREADS=1 $(BIN)/python examples/digits_cnn_ptq.py

demo-qat: $(VENV)/ready  ## train a depthwise CNN at 4 bits, and all-MiniLM-L6-v2 with itself as teacher
	OMP_NUM_THREADS=1 $(BIN)/python examples/qat_digits.py --plot out/qat_digits.png
	OMP_NUM_THREADS=1 $(BIN)/python examples/qat_minilm.py

demo-llm: $(LLM)/ready  ## round the weights of the pretrained SmolLM2-135M-Instruct and let it write
	PYTHONPATH=$(LLM) OMP_NUM_THREADS=1 $(BIN)/python examples/llm_weight_only.py

test: test-core test-ipex  ## the whole suite on torch 2.13, and what depends on torch on 2.8 with IPEX

test-core: $(VENV)/ready  ## the whole suite on torch 2.13
	$(BIN)/python $(PYTEST)

test-ipex: $(IPEX_VENV)/ready  ## all that depends on torch, on torch 2.8 with IPEX 2.8
	ONLY_IPEX='$(ONLY_IPEX)' $(IPEX_VENV)/bin/python $(PYTEST) $(SAME:%=--ignore tests/%)

test-latest:  ## the whole suite on the newest of everything that setup.cfg allows
	test -x $(LATEST_VENV)/bin/python || $(PYTHON) -m venv $(LATEST_VENV)
	$(LATEST_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(LATEST_VENV)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e '.[examples,dev]'
	$(LATEST_VENV)/bin/python -m pip freeze --exclude-editable
	$(LATEST_VENV)/bin/python $(PYTEST)

# How many random orders of calls the long run tries for each small model; `make test` takes the same few each time.
SEQUENCES ?= 20
LONG := LONG_TESTS=1 SEQUENCES=$(SEQUENCES)
test-long: $(VENV)/ready $(IPEX_VENV)/ready  ## every case of all lists and grids, of which `make test` takes some (see tests/thinning.py)
	$(LONG) $(BIN)/python $(PYTEST) --timeout=0
	$(LONG) $(IPEX_VENV)/bin/python $(PYTEST) --timeout=0

test-zoo: $(VENV)/ready $(IPEX_VENV)/ready  ## of the long run, every architecture, also as ONNX file and on IPEX
	$(LONG) $(BIN)/python $(PYTEST) tests/test_zoo.py tests/test_coverage.py tests/test_decoding.py \
	  tests/test_decoding_zoo.py tests/test_onnx_zoo.py tests/test_onnx_pretrained.py
	$(LONG) $(IPEX_VENV)/bin/python $(PYTEST) tests/test_ipex_zoo.py tests/test_zoo.py

test-sequences: $(VENV)/ready  ## of the long run, SEQUENCES (20) random orders of calls for each small model
	$(LONG) $(BIN)/python -m pytest -n 2 --timeout=0 tests/sequences

# How many random models; those that run as ONNX files are a fifth of that. 5000 take two to three hours.
FUZZ ?= 1000
fuzz: $(VENV)/ready  ## FUZZ (1000) random models, and what must hold of each; what fails is printed, what crashes is out/fuzz/last.py
	PYTHONFAULTHANDLER=1 LONG_TESTS=1 FUZZ=$(FUZZ) nice -n 19 $(BIN)/python -m pytest -n 0 --timeout=0 tests/fuzz

check: $(VENV)/ready  ## lint, types and the smoke tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_tiny.py

format: $(VENV)/ready  ## put every file in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/ready  ## latency, calibration cost, sensitivity ranking, a step of QAT; writes benchmarks/results/
	taskset -c 0 env OMP_NUM_THREADS=1 $(BIN)/python benchmarks/latency.py
	taskset -c 0 env OMP_NUM_THREADS=1 $(BIN)/python benchmarks/calibration.py
	taskset -c 0 env OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sensitivity.py
	taskset -c 0 env OMP_NUM_THREADS=1 $(BIN)/python benchmarks/qat.py

bench-ipex: $(IPEX_VENV)/ready  ## latency on IPEX, beside IPEX's own prepare and convert
	taskset -c 0 env OMP_NUM_THREADS=1 $(IPEX_VENV)/bin/python benchmarks/latency.py --all --ways float32 onednn ipex --out latency_ipex
	taskset -c 0 env OMP_NUM_THREADS=1 $(IPEX_VENV)/bin/python benchmarks/ipex_own.py

bench-peers: $(PEERS)/ready  ## latency of 13 models by every way to run them, other tools' int8 among them; an hour
	PYTHONPATH=$(PEERS) taskset -c 0 env OMP_NUM_THREADS=1 $(BIN)/python benchmarks/latency.py --all --plot out/latency.png

bench-memory: $(PEERS)/ready  ## memory of 13 models by the same ways, while they are made and while they serve; an hour
	PYTHONPATH=$(PEERS) OMP_NUM_THREADS=1 $(BIN)/python benchmarks/memory.py

bench-accuracy: $(PEERS)/ready $(LLM)/ready $(ACCURACY)/ready  ## twelve trained networks in int8 on real data, beside other tools; hours, and goes on where it was stopped
	PYTHONPATH=$(ACCURACY):$(PEERS):$(LLM) OMP_NUM_THREADS=1 $(BIN)/python benchmarks/accuracy.py --resume --plot out/accuracy.png

bench-zoo: $(VENV)/ready  ## every architecture of transformers, timm and torchvision that can be built small; hours, and goes on where it was stopped
	OMP_NUM_THREADS=1 nice -n 19 $(BIN)/python benchmarks/zoo.py --resume

bench-llm: $(LLM)/ready  ## a language model's perplexity, size and speed by format and weight method
	PYTHONPATH=$(LLM) OMP_NUM_THREADS=1 $(BIN)/python benchmarks/llm.py accuracy
	PYTHONPATH=$(LLM) taskset -c 0 env OMP_NUM_THREADS=1 $(BIN)/python benchmarks/llm.py speed

clean:  ## remove the environments and caches
	rm -rf $(VENV) $(IPEX_VENV) $(LATEST_VENV) $(LOCK_VENV) $(DOCS_VENV) $(AUDIT_VENV) $(PYTHONPYCACHEPREFIX) $(LLM) $(PEERS) $(ACCURACY) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
