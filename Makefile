# Needs git, make and Python 3.11 or later; everything else goes into .venv.
# PYTHON=/path/to/python chooses the interpreter.

VENV := .venv
PY := $(VENV)/bin/python
INPUTS := pyproject.toml constraints.txt tools/venv

# Two stages, so that the demo does not wait for what only tests want.
RUNS := $(VENV)/.runs
TESTS := $(VENV)/.tests
FUZZ := $(VENV)/.fuzz

COMPILED := $(CURDIR)/build/compiled-package
EXECUTIONS := 1000000
TARGETS :=
PARTS :=
MINUTES := 10
FLAGS :=

.PHONY: help demo test container compiled check bench soak fuzz fmt
.DELETE_ON_ERROR:

help:
	@echo "make demo    a whole mesh of two apps on this machine, with real requests through it"
	@echo "make test    lint, types, tests and the coverage they must reach"
	@echo "make compiled  the data plane as C, and the tests that can be run with it: minutes"
	@echo "make container  build the image and test it and the compose example; needs docker"
	@echo "make check   lint and types only"
	@echo "make bench   the races against other proxies, 12 minutes: PARTS=\"...\" for some of them,"
	@echo "             FLAGS=\"--list\", \"--short\", \"--publish\" (see docs/performance.md)"
	@echo "make soak    $(MINUTES) minutes of load while certificates renew: MINUTES=..., FLAGS=\"--agent-fails\""
	@echo "make fuzz    coverage-guided fuzzing, of all targets in turn: EXECUTIONS=$(EXECUTIONS)"
	@echo "             of each, TARGETS=\"...\" for some; CPython 3.11 to 3.13 on x86-64 Linux only"
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

# A wheel as users get it, before the checkout on the path. What can't be run with it, and why:
# tests/compiled.py.
compiled: $(TESTS)
	@rm -rf build/wheels $(COMPILED)
	@$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps -w build/wheels .
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $(COMPILED) build/wheels/*.whl
	DSTACK_MESH_COMPILED=$(COMPILED) PYTHONPATH=$(COMPILED) \
		$(PY) -m pytest -n 2 -m "not container" -p no:cacheprovider $$($(PY) -m tests.compiled)

container: $(TESTS)
	$(PY) -m pytest -m container -n 0 tests/container

bench: $(TESTS)
	$(PY) -m bench $(PARTS) $(FLAGS)

soak: $(TESTS)
	$(PY) -m bench.soak --minutes $(MINUTES) $(FLAGS)

$(FUZZ): $(TESTS)
	@tools/venv $(VENV) '.[fuzz]'
	@touch $@

fuzz: $(FUZZ)
	$(PY) -m fuzz --runs $(EXECUTIONS) $(TARGETS)

fmt: $(TESTS)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
