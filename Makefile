# `make quickstart` trains a small model from nothing; `make test` and `make check` are what CI runs (.ci/run).
# Needs Python 3.11 with venv and pip, make, and a C++ compiler. Everything else comes from .ci/requirements.lock.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help venv quickstart test test-long gpu-test check format clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   set up, then train, sample and score a small model on this machine"
	@echo "make venv         set up $(VENV) from .ci/requirements.lock"
	@echo "make test         all tests that need no GPU and no long time"
	@echo "make test-long    the tests that take minutes"
	@echo "make gpu-test     the tests that need a CUDA device"
	@echo "make check        ruff, format, mypy, import-linter"
	@echo "make format       let ruff write what it can mend"
	@echo "make clean        remove caches and build folders (not $(VENV), not runs)"

venv: $(STAMP)

# The stamp is written last, so that an interrupted installation is taken up again.
$(STAMP): .ci/requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 11) else "$(PYTHON) is Python %d.%d; DiffuSSM needs 3.11: make PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r .ci/requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

quickstart: venv
	$(BIN)/diffussm train configs/quickstart.yaml

# Two workers (WORKERS=0: none), a file of tests in one of them; see tests/conftest.py.
WORKERS ?= 2
SPREAD := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# One thread for each process: tests start several, and threads that outnumber the cores cost far more than they give.
test test-long gpu-test: export OMP_NUM_THREADS ?= 1

test: venv
	$(BIN)/python -m pytest $(SPREAD) -m "not long and not gpu" $(PYTEST_ARGS)

test-long: venv
	$(BIN)/python -m pytest -m "long and not gpu" $(PYTEST_ARGS)

gpu-test: venv
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

check: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find diffussm cluster launch tests -name __pycache__ -type d -prune -exec rm -rf {} +
