# Two commands matter: `make demo` runs the main job, `make test` the tests. Both set themselves up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: demo test lint format network acceptance slow fuzz study-small docs proto clean help
.DEFAULT_GOAL := help

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fednano needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## Tune the tiny model over five clients with different data, and report
	$(BIN)/fednano simulate
	@echo "Ask the tuned model:  $(BIN)/fednano generate latest --image $$(ls runs/latest/images/*.png | head -1) 'what color is the shape?'"

test: $(STAMP)  ## Run the default tests
	$(BIN)/pytest -n 2 --dist worksteal

network: $(STAMP)  ## Run the tests with real Flower processes
	$(BIN)/pytest -m network

acceptance: $(STAMP)  ## Run what users run: notebook, commands of README and docs, a new app, the wheel
	$(BIN)/pytest -m acceptance -n 2 --dist worksteal --timeout 1200

slow: $(STAMP)  ## Run the tests that take minutes each
	$(BIN)/pytest -m slow --timeout 3600

fuzz: $(STAMP)  ## Give the parsers that face the network a million inputs (an hour or two)
	FEDNANO_FUZZ=50000 $(BIN)/pytest tests/fuzz --timeout 0 -n 2

study-small: $(STAMP)  ## Compare merge rules over data of different heterogeneity, in minutes
	OMP_NUM_THREADS=1 $(BIN)/python simulations/study.py --small --jobs 2

lint: $(STAMP)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd benchmarks && ../$(BIN)/mypy --config-file ../pyproject.toml --ignore-missing-imports --no-warn-unused-ignores --no-warn-return-any *.py  # apart: `kernels` has two meanings

format: $(STAMP)  ## Put the code into its standard form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## Build the documentation into site/, strictly
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict

proto: $(STAMP)  ## Generate the protocol code of the language host again
	$(BIN)/python fednano/host/proto/generate.py  # by its path: the package may not import until this has run

clean:  ## Remove the environment and everything that can be made again
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
