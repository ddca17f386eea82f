# Each target installs what it needs into .venv. Needed: Python 3.11 or later, make, a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
INSTALL := $(UV) pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt

#: The host of the advisory service that pip-audit asks.
ADVISORIES := api.osv.dev
#: Processes of the tests: one more than cores, because tests wait for servers.
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
#: The tests of a file stay together, and share its fixtures. Files keep their order: those of flows
#: take longest, and come early. Tests start many processes, so compiled modules are kept even if
#: the environment forbids it.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses $(WORKERS) \
  --dist loadfile --no-loadscope-reorder

#: Tests of `make check`: quick ones that train nothing.
FAST := tests/test_structure.py tests/test_docs.py tests/data_catalog/provenance \
  $(patsubst %,tests/data_catalog/test_%.py,catalogue stage redaction sources) \
  $(patsubst %,tests/geofm/%,config formats runtime remote raster pool evaluation)

.DEFAULT_GOAL := help
.PHONY: help demo check test test-slow pgstac interop lint audit format docs bench constraints clean

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

check: $(VENV)/.test lint  ## Before a commit: lint, types, fast tests (2 minutes)
	$(PYTEST) -m "not slow and not long" $(FAST)

test: $(VENV)/.test lint  ## All tests but the long ones; tests whose tools are missing are skipped, with the reason
	$(PYTEST)

test-slow: $(VENV)/.test  ## The long tests: faults, matrices, the wheel, random sequences
	$(PYTEST) -m long

pgstac: | $(UV)  ## A STAC server for tests in .venv-pgstac (its fastapi is not Prefect's)
	$(UV) venv --quiet --allow-existing .venv-pgstac
	$(UV) pip install --quiet --compile-bytecode --python .venv-pgstac/bin/python \
	  stac-fastapi-pgstac "pypgstac[psycopg]" uvicorn

interop: $(VENV)/.test  ## Install the libraries that tests open exported datasets and models with
	$(INSTALL) -e ".[test,interop]"

lint: $(VENV)/.test audit  ## ruff, mypy --strict, deptry (imports and dependencies agree), pip-audit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/deptry .

audit: $(VENV)/.test  ## Known vulnerabilities in constraints.txt; skipped, with a message, without network
	@if $(BIN)/python -c 'import requests; requests.head("https://$(ADVISORIES)", timeout=5)' 2>/dev/null; \
	then $(BIN)/pip-audit -r constraints.txt --disable-pip --vulnerability-service osv; \
	else echo "pip-audit: SKIPPED, because $(ADVISORIES) can't be reached from this machine"; fi

format: $(VENV)/.test  ## Format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.test  ## Build the documentation site into site/; a broken link is an error
	$(INSTALL) -e ".[test,docs]"
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.test  ## The benchmarks; results go to benchmarks/results
	@for name in plan resume cut; do $(BIN)/python benchmarks/$$name.py || exit 1; done

constraints: | $(UV)  ## Write constraints.txt: all versions with hashes. Add UPGRADE=--upgrade for newer ones
	$(UV) pip compile --quiet $(UPGRADE) --universal --python-version 3.11 --all-extras --generate-hashes \
	  --no-emit-index-url --no-annotate --no-header pyproject.toml -o constraints.txt

clean:  ## Remove the environment and caches; stores stay
	rm -rf $(VENV) .venv-pgstac site .mypy_cache .ruff_cache .pytest_cache *.egg-info
