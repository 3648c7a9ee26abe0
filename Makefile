# Every target does its own set-up. On a fresh machine only `python3` (3.11 or newer) and make are needed.
PYTHON ?= python3
VENV ?= .venv
VENV312 ?= .venv312
VENVAOT ?= .venv-aot
BIN := $(VENV)/bin
JOBS ?= 2
# The torch models that tests compare with are tiny: more threads make them slower.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test test-short browser lint format bench bench-torch aot aot-sample plan-docs recipe-docs embedded clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 14

demo: $(VENV)/.installed  ## complete held-out Python code with the embedded pair, and compare with plain decoding
	@$(BIN)/python -m benchmarks.demo

test: $(VENV)/.installed-test  ## the whole test suite
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=30 tests

browser:  ## Chromium for the test of the server's page, from Debian's packages, as root; without it the test is skipped
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -qq --no-install-recommends chromium; } || \
		echo "browser: Chromium cannot be installed here"

lint: $(VENV)/.installed-lint  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check

format: $(VENV)/.installed-lint  ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed  ## the README's figures for the embedded pair
	$(BIN)/python -m benchmarks.pair

bench-torch: $(VENV)/.installed-test  ## the README's figures against PyTorch
	$(BIN)/python -m benchmarks.baselines

aot: $(VENVAOT)/.installed  ## compile every kernel, and a small model's round, for TPUs and GPUs; writes docs/kernels.md
	$(VENVAOT)/bin/python -m benchmarks.aot $(SAMPLE)
	$(VENVAOT)/bin/python -m pytest -n $(JOBS) tests/test_topology.py tests/test_plan.py

aot-sample: SAMPLE = --sample
aot-sample: aot  ## the same with each kernel's case compiled for one chip only, in turn: minutes, not an hour

plan-docs: $(VENVAOT)/.installed  ## plan Qwen3.5-397B-A17B for three topologies; writes docs/plan.md (an hour)
	$(VENVAOT)/bin/python -m benchmarks.plan_docs

recipe-docs: $(VENVAOT)/.installed  ## plan a training step of every recipe; writes docs/training.md (hours; one: python -m benchmarks.recipe_docs NAME)
	$(VENVAOT)/bin/python -m benchmarks.recipe_docs

embedded: $(VENV)/.installed-train  ## train the embedded pair again
	$(BIN)/python -m train.embedded

clean:  ## remove what the targets installed
	rm -rf $(VENV) $(VENV312) $(VENVAOT)

# A stamp file for each set of packages; a set is installed again only when pyproject.toml is newer than its stamp.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

# The second leg: Python 3.12 with the newest jax and flax, and no torch.
SHORT_TESTS = $(shell find tests -name 'test_*.py' | grep -E 'golden|embedded|test_greedy|test_batching|test_cli|test_text|tests/test_plan|tests/test_sharding|kernels/test_.*_.pu')
PYTHON312 ?= $(shell for p in python3.12 $$(ls -d $$HOME/.pyenv/versions/3.12*/bin/python 2>/dev/null); do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && { echo $$p; break; }; done)

ifeq ($(strip $(PYTHON312)),)
test-short:  ## goldens and the embedded pair on Python 3.12 with the newest jax and flax, without torch
	@echo "test-short: skipped, no Python 3.12 found (set PYTHON312=/path/to/python3.12)"
else
test-short: $(VENV312)/.installed
	XLA_FLAGS= $(VENV312)/bin/python -m pytest -n $(JOBS) $(SHORT_TESTS)
endif

$(VENV312)/bin/python:
	$(PYTHON312) -m venv $(VENV312)

$(VENV312)/.installed: pyproject.toml | $(VENV312)/bin/python
	$(VENV312)/bin/python -m pip install --quiet --editable '.[test-short]'
	@touch $@

# The compilers for TPUs and GPUs, in an environment of their own: beside them jax looks for accelerators at every start.
$(VENVAOT)/bin/python:
	$(PYTHON) -m venv $(VENVAOT)

$(VENVAOT)/.installed: pyproject.toml | $(VENVAOT)/bin/python
	$(VENVAOT)/bin/python -m pip install --quiet --editable '.[aot,train,test-short]'
	@touch $@
