# Two commands for a newcomer: `make demo` and `make test`. Each sets up what it needs in .venv, once.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := cluster/constraints.txt

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/gammaray data demo .demo/data --rows 20000
	$(BIN)/gammaray train configs/demo.yaml

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) .demo runs build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# torch first, at the pinned version: otherwise a later requirement may choose another build of it.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@echo "Setting up $(VENV) (once; a few minutes)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) --group dev
	touch $@
