# Everything runs in .venv, made with pip and venv alone. `make demo` and `make test` need nothing before them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test cluster chaos check format lint types clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"python {sys.version.split()[0]}: raysearch needs 3.11 or newer; set PYTHON=python3.11 (or newer)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m raysearch.run --study demo --trials 8

test: $(READY)
	$(BIN)/python -m pytest

# Several nodes on this machine, every fault on its own: half an hour, as root on Linux
cluster: $(READY)
	$(BIN)/python -m pytest -m cluster

# Of that what CI runs, all but each fault on its own: a quarter of an hour
chaos: $(READY)
	$(BIN)/python -m pytest -s -rs -m cluster --ignore tests/cluster/test_faults.py

check: format lint types test

format: $(READY)
	$(BIN)/ruff format --check .

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build *.egg-info
