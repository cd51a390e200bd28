# `make help` names the targets. Everything happens in .venv, which is made on the first call and again only when
# dependencies change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_OUTPUT ?= amoeba_demo
PYTEST_ARGS ?=

.PHONY: help demo test test-integrations lint types layers unit coverage format install clean
.DEFAULT_GOAL := test

help: ## name the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile

install: $(STAMP) ## make .venv with all that is needed

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[test]'
	touch $@

demo: $(STAMP) ## compress, quantize, reload and measure the model that comes with the package (9 minutes)
	$(BIN)/amoeba demo --output-dir $(DEMO_OUTPUT)

test: lint types layers unit ## all checks and tests; the default

# Each brings an engine: installed beside the package, with nothing to skip but what a compiler makes, and a page.
INTEGRATIONS := $(patsubst %/pyproject.toml,%,$(wildcard integrations/*/pyproject.toml))
# What drives the HTTP service; its page is tested where a Chromium is installed.
CLIENTS := openai playwright

test-integrations: $(STAMP) ## tests of the packages in integrations/, by the engines that they bring
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt $(addprefix -e ,$(INTEGRATIONS)) $(CLIENTS)
	set -e; for each in $(INTEGRATIONS); do OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $$each/tests $(PYTEST_ARGS); done

lint: $(STAMP) ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## types
	$(BIN)/mypy

layers: $(STAMP) ## which module may import which
	$(BIN)/lint-imports --no-cache

# One thread per worker: two workers on two cores must not fight over them. Tests that share
# what takes long to make stay on one worker: those of an xdist_group.
UNIT := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not gpu and not hub and not slow"

unit: $(STAMP) ## tests; PYTEST_ARGS="-k name" for some
	$(UNIT) $(PYTEST_ARGS)

coverage: $(STAMP) ## the same tests, and what of the code they run; takes longer
	$(UNIT) --cov --cov-report=term:skip-covered --cov-fail-under=97 $(PYTEST_ARGS)

format: $(STAMP) ## rewrite the sources in style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and what the tools leave
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage*
