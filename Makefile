PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export OMP_WAIT_POLICY := PASSIVE
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: iterate test check ui base docs

# The whole loop on the embedded default; run it again and it finds everything done.
iterate: .venv/installed
	$(BIN)/mlflow run . -e iterate --env-manager=local --experiment-name sicog

test: .venv/installed
	$(BIN)/pytest

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy

ui: .venv/installed
	$(BIN)/sicog ui

# The guide as a site: build/site/index.html.
docs: .venv/installed
	$(BIN)/properdocs build -f mkdocs.yml --strict

# Trains the embedded base again and puts it where the package ships it.
base: .venv/installed
	$(BIN)/sicog base experiments/base.yaml --publish sicog_exp/models/base

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@
