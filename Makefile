# The commands of this repository ("make help" lists them); each installs what it needs in .venv first.
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt
OLDEST_TRANSFORMERS := $(shell sed -n 's/^requirements *=.*transformers>=\([0-9.]*\).*/\1/p' settings.ini)
OLDEST := $(shell sed -n 's/^min_python *= *//p' settings.ini)

.PHONY: help setup dev toy test test-all test-oldest bench lab docs readme clean

help: ## list the targets (the default)
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12
	@echo "Options: PYTHON=python3.11, PIP_ARGS='--index-url ...', ARGS='options of the command'"

setup: .venv/.run ## install what running needs, at the tested versions

dev: .venv/.dev ## install what tests, notebooks and pages need as well

toy: .venv/.run ## train the tiny model end to end
	$(BIN)/deepvideo-r1 toy $(ARGS)

test: .venv/.dev ## run the tests, every notebook among them
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-all: .venv/.dev ## run the slow tests too, and those for a GPU where there is one
	$(BIN)/python -m pytest -n 2 -m "" $(ARGS)

test-oldest: .venv/.dev ## run the tests with the oldest transformers that is supported
	$(BIN)/python -m pip install $(PIP_ARGS) -q --no-deps --upgrade --target .oldest "transformers==$(OLDEST_TRANSFORMERS)"
	PYTHONPATH=$(CURDIR)/.oldest $(BIN)/python -m pytest -n 2 $(ARGS)

bench: .venv/.run ## measure speed and memory against peers, half an hour (against TRL where it is installed)
	@for name in repeated_vs_packed rollout_vs_generate growth augmentation_cost reading read_ahead; do $(BIN)/python benchmarks/$$name.py $(ARGS) || exit 1; done
	@if $(BIN)/python -c 'import trl' 2>/dev/null; then $(BIN)/python benchmarks/step_vs_trl.py $(ARGS); \
	  else echo "TRL is not installed, see benchmarks/README.md: step_vs_trl.py was not run"; fi

lab: .venv/.dev ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --ServerApp.root_dir=nbs $(ARGS)

docs: .venv/.dev ## build the site into _site/
	$(BIN)/python docs/build.py
	$(BIN)/python -m sphinx -q -W --keep-going -E -b html -c docs _sphinx _site
	@echo "Open _site/index.html"

readme: .venv/.dev ## run nbs/index.ipynb and write README.md from it
	$(BIN)/python docs/readme.py

clean: ## remove built pages, packages and caches; .venv and runs/ stay
	rm -rf .oldest _sphinx _site jupyter_execute _proc _docs build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The stamps make each installation happen once, and again when what it is made from has changed.
.venv/.run: settings.ini setup.py constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.run
	$(PIP) -e '.[dev]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(OLDEST)".split("."))))' \
	  2>/dev/null || { echo "$(PYTHON) is missing or older than Python $(OLDEST): install a newer one and name it, make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: install python3-venv (apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv .venv
