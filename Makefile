# Every verb sets up what it needs on first use; `make help` lists them.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# What an installation is made of, beyond Python files.
BUILT := pyproject.toml hatch_build.py src/esper/tolaria/aggregation/native.c
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types layers size complexity docs coverage bench clean

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/demo.stamp ## set up and train the built-in job, with a fire drill and a report
	$(BIN)/esper train

test: $(VENV)/dev.stamp ## set up and run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

coverage: $(VENV)/dev.stamp ## run all tests; at least 90 % of the lines must be covered
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term

check: lint types layers size complexity docs ## run every gate that is no test

lint: $(VENV)/dev.stamp ## style, complexity of functions, docstrings, banned imports
	$(BIN)/ruff check src tests benchmarks examples scripts
	$(BIN)/ruff format --check src tests benchmarks examples scripts

types: $(VENV)/dev.stamp ## mypy, strict
	$(BIN)/mypy

layers: $(VENV)/dev.stamp ## imports point down only
	$(BIN)/lint-imports

size: $(VENV)/dev.stamp ## length of files, functions and parameter lists
	$(BIN)/python scripts/size_gate.py

complexity: $(VENV)/dev.stamp ## docs/complexity.md is up to date and nothing is above 10
	$(BIN)/python scripts/complexity_report.py --check

docs: $(VENV)/dev.stamp ## snippets run, links resolve, generated files are up to date
	$(BIN)/python scripts/env_example.py --check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_docs.py

bench: $(VENV)/bench.stamp ## loop, calls, aggregation and rollback, beside other packages
	$(BIN)/python benchmarks/loop_overhead.py
	$(BIN)/python benchmarks/worker.py
	$(BIN)/python benchmarks/aggregation.py
	$(BIN)/python benchmarks/rollback.py

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage*

$(VENV)/pip.stamp:
	@test -n "$(PYTHON)" || { echo "Esper needs Python 3.11 or newer; set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) ..."
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/demo.stamp: $(VENV)/pip.stamp $(BUILT)
	@echo "installing Esper ..."
	$(PIP) $(TORCH) -e '.[demo]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/pip.stamp $(BUILT)
	@echo "installing Esper with its development tools ..."
	$(PIP) $(TORCH) -e '.[demo,dev]'
	@touch $@ $(VENV)/demo.stamp

$(VENV)/bench.stamp: $(VENV)/dev.stamp
	@echo "installing the trainers to compare with ..."
	$(PIP) $(TORCH) -e '.[demo,dev,bench]'
	@touch $@
