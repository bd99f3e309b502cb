# Two commands for everybody: `make demo` and `make test`. Both set up .venv first, at no cost the second time.
# Settings: PYTHON=/path/to/python3.11 (for a new .venv), VENV=folder, ARGS="..." (passed to demo, test and bench).

SHELL := /bin/bash
VENV ?= .venv
BIN := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.sextant-set-up
BENCHMARKS := $(filter-out __init__ harness,$(basename $(notdir $(wildcard benchmarks/*.py))))
ARGS ?=

# The venv's ninja must be on PATH for the kernels, and its ray for jobs.
export PATH := $(BIN):$(PATH)
export PYTHON VENV

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench clean

help:
	@echo "make demo    set up if needed, then serve a language model whose requests move between instances"
	@echo "make test    set up if needed, then lint and run all tests"
	@echo "make setup   make .venv, install Sextant and the demo's model, compile the kernels"
	@echo "make lint    ruff, import contracts, mypy        make format  let ruff put the files into shape"
	@echo "make bench   every benchmark, reduced            make clean   remove .venv and caches"

setup: $(STAMP)
	@:

$(STAMP): pyproject.toml tools/setup.sh
	@tools/setup.sh
	@touch $@

demo: setup
	@$(BIN)/python -m apps.llumnix demo $(ARGS)

test: setup lint
	$(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	@set -e; for name in $(BENCHMARKS); do \
	  echo "== $$name"; $(BIN)/python -m benchmarks.$$name --quick --out runs/benchmarks $(ARGS); \
	done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find apps actors kernels benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
