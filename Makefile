# Every target makes its own virtual environment; nothing need be installed but Python 3.11 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: quickstart test test-all bench lint audit build clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for users, one for developers: installing again only when what is asked for has changed.
$(VENV)/.train: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(VENV)/.train
	$(BIN)/inlay quickstart

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/inject_load.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/pyright

audit: $(VENV)/.dev
	$(BIN)/pip-audit --skip-editable

build: $(VENV)/.dev
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) dist
