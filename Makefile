PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Without bytecode every process of the tests would compile torch and Lightning anew.
export PYTHONDONTWRITEBYTECODE :=
INSTALLED := .venv/installed

.PHONY: demo test lint soak lock

demo: $(INSTALLED)
	$(BIN)/csd experiment=demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist worksteal

# What starts whole groups of processes, kills them, or trains: CI runs it as well.
soak: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak -n logical --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

# Every package at the version last tested; carries no host names.
lock:
	$(BIN)/uv pip compile --quiet --python-version 3.11 --extra dev \
		--no-header --no-annotate --no-emit-index-url --output-file requirements.lock pyproject.toml
