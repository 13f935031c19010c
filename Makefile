PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Without bytecode every process of the tests would compile torch and Lightning anew.
export PYTHONDONTWRITEBYTECODE :=
INSTALLED := .venv/installed
EXTRAS := .venv-extras
RAY := .venv-ray

.PHONY: demo test lint soak extras ray lock

demo: $(INSTALLED)
	$(BIN)/csd experiment=demo
	@echo "open $$(ls -t outputs/demo/*/report.html | head -n 1)"

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist worksteal

# What starts whole groups of processes, kills them, or trains: CI runs it as well.
soak: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak -n logical --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Launchers, searches and signatures; apart, since Hydra imports every plugin that it finds at every start.
extras: $(EXTRAS)/installed
	OMP_NUM_THREADS=1 $(EXTRAS)/bin/python -m pytest -n logical tests/test_sweeps.py tests/test_credentials.py

# Ray's launcher holds back cloudpickle, which joblib's does not work with.
ray: $(RAY)/installed
	OMP_NUM_THREADS=1 $(RAY)/bin/python -m pytest -m "soak or not soak" -k "launcher and ray" tests/test_sweeps.py

$(INSTALLED): LOCK := requirements.lock
$(EXTRAS)/installed: LOCK := requirements-extras.lock
$(RAY)/installed: LOCK := requirements-ray.lock
LOCKS := requirements.lock requirements-extras.lock requirements-ray.lock
$(INSTALLED) $(EXTRAS)/installed $(RAY)/installed: %/installed: $(LOCKS) pyproject.toml
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$*/bin/uv pip install --quiet --python $*/bin/python -r $(LOCK)
	$*/bin/uv pip install --quiet --python $*/bin/python --no-deps --editable .
	touch $@

# Every package at the version last tested; carries no host names.
COMPILE := $(BIN)/uv pip compile --quiet --python-version 3.11 --no-header --no-annotate --no-emit-index-url
lock:
	$(COMPILE) --extra dev --output-file requirements.lock pyproject.toml
	$(COMPILE) --extra dev --extra extras --constraint requirements.lock \
		--output-file requirements-extras.lock pyproject.toml
	$(COMPILE) --extra dev --extra ray --output-file requirements-ray.lock pyproject.toml
