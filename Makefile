# Two commands do everything on a machine with Python and make:
#   make demo    environment, install, the main job
#   make test    environment, install, the test suite

PYTHON ?= python3
VENV ?= .venv
# Which torch to install where the system has none; any requirement pip understands.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
DEMO ?=
PYTEST ?=

.PHONY: help demo test test-all check format lint types build bench clean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

# A torch that the system already has (one built for its GPU, say) is used as it is; otherwise the pinned one is installed.
$(VENV)/installed: pyproject.toml constraints.txt
	if $(PYTHON) -c "import torch" 2>/dev/null; then \
	  $(PYTHON) -m venv --system-site-packages $(VENV) && grep -v '^torch==\|^numpy==' constraints.txt > $(VENV)/constraints.txt; \
	else \
	  $(PYTHON) -m venv $(VENV) && cp constraints.txt $(VENV)/constraints.txt && $(BIN)/python -m pip install --quiet "$(TORCH)" numpy -c constraints.txt; \
	fi
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e ".[dev]"
	touch $@

## make demo      train on packed real documents on one rank and under context parallelism, and compare
demo: $(VENV)/installed
	$(BIN)/python -m cphandler.demo $(DEMO)

## make test      the test suite
test: $(VENV)/installed
	$(BIN)/python -m pytest -q -m "not slow" $(PYTEST)

## make test-all  the test suite with the slow sweeps
test-all: $(VENV)/installed
	$(BIN)/python -m pytest -q $(PYTEST)

## make check     format, lint, types and tests: what CI runs
check: lint types test

## make format    rewrite the sources in the project's format
format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/installed
	$(BIN)/mypy

## make build     wheel and source distribution
build: $(VENV)/installed
	$(BIN)/python -m build --no-isolation

## make bench     attention under every backend beside the plain kernel on one rank
bench: $(VENV)/installed
	$(BIN)/python benchmarks/attention.py $(BENCH)

clean:
	rm -rf $(VENV) build dist *.egg-info demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis
