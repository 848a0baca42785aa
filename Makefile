# Needs git, make and Python 3.11 or later; everything else goes into .venv.
# PYTHON=/path/to/python chooses the interpreter.

VENV := .venv
PY := $(VENV)/bin/python
INPUTS := pyproject.toml constraints.txt tools/venv

# Two stages, so that the demo does not wait for what only tests want.
RUNS := $(VENV)/.runs
TESTS := $(VENV)/.tests

.PHONY: help demo test check bench fmt
.DELETE_ON_ERROR:

help:
	@echo "make demo    a whole mesh of two apps on this machine, with real requests through it"
	@echo "make test    lint, types, tests and the coverage they must reach"
	@echo "make check   lint and types only"
	@echo "make bench   the races against other proxies, and their report"
	@echo "make fmt     format the code"

$(RUNS): $(INPUTS)
	@tools/venv $(VENV) .
	@touch $@

$(TESTS): $(RUNS)
	@tools/venv $(VENV) '.[test,check]'
	@touch $@

demo: $(RUNS)
	@$(PY) -m dstack_mesh demo

check: $(TESTS)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: check
	@mkdir -p build
	$(PY) -m pytest -n 2 --cov --cov-report=json:build/coverage.json
	$(PY) tools/coverage_gates.py build/coverage.json

bench: $(TESTS)
	$(PY) -m bench

fmt: $(TESTS)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
