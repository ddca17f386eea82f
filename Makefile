# Everything sets itself up: all that is needed is Python 3.11+, make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
INSTALL := $(UV) pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow pgstac interop lint format bench constraints clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(UV):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv

$(VENV)/.run: pyproject.toml constraints.txt | $(UV)
	$(INSTALL) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(INSTALL) -e ".[test]"
	@touch $@

demo: $(VENV)/.run  ## The whole pipeline on the embedded planet (store: ./geofm-store)
	$(BIN)/geofm demo

test: $(VENV)/.test lint  ## All tests but the long ones; what needs more than is here is skipped and says so
	$(BIN)/python -m pytest

test-slow: $(VENV)/.test  ## The long tests: faults, nights, random sequences
	$(BIN)/python -m pytest -m long

pgstac: | $(UV)  ## A STAC server for tests in .venv-pgstac (its fastapi is not Prefect's)
	$(UV) venv --quiet --allow-existing .venv-pgstac
	$(UV) pip install --quiet --compile-bytecode --python .venv-pgstac/bin/python \
	  stac-fastapi-pgstac "pypgstac[psycopg]" uvicorn

interop: $(VENV)/.test  ## What tests open exported datasets and models with
	$(INSTALL) -e ".[test,interop]"

lint: $(VENV)/.test  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test  ## Format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test  ## The benchmarks; results go to benchmarks/results
	@for name in plan resume cut; do $(BIN)/python benchmarks/$$name.py || exit 1; done

constraints: | $(UV)  ## Choose newer versions of everything: rewrites constraints.txt
	$(UV) pip compile --quiet --universal --python-version 3.11 --all-extras --generate-hashes \
	  --no-emit-index-url --no-annotate --no-header pyproject.toml -o constraints.txt

clean:  ## Remove the environment and caches; stores stay
	rm -rf $(VENV) .venv-pgstac .mypy_cache .ruff_cache .pytest_cache *.egg-info
