# Targets for work on a checkout with its environment in .venv (CONTRIBUTING.md, Tests).
PYTHON ?= .venv/bin/python

.PHONY: help install test slow gpu check format pages

help: ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

install: ## Create .venv with the extras test and compat
	python3 -m venv .venv
	.venv/bin/pip install -q -c constraints.txt -e '.[compat]'

test: ## Run the fast tests
	$(PYTHON) -m pytest -n 2

slow: ## Run the slow tests
	$(PYTHON) -m pytest -n 2 -m slow

gpu: ## Run the tests that need a CUDA device
	$(PYTHON) -m pytest -m gpu

check: ## Check style and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: ## Fix and format the code
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

pages: ## Write the generated pages: the config's and the table of packages
	$(PYTHON) -m tests.conf_readme
	$(PYTHON) -m tests.layout
	$(PYTHON) -m tests.models_readme
