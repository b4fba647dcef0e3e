PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# Two test processes share two cores: threads of theirs that wait for one another would cost several times the time.
TESTED := PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1

.PHONY: quickstart test test-thorough lint bench clean

quickstart: $(INSTALLED)  ## the main job on synthetic CT, a quarter to half an hour on two CPU cores
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/quickstart.sh

test: $(INSTALLED)  ## all tests, in two processes; those of a file in the same one
	$(TESTED) $(BIN)/python -m pytest -n 2 --dist loadfile

test-thorough: $(INSTALLED)  ## as test, with what is left out there: more networks, more faults
	$(TESTED) $(BIN)/python -m pytest -n 2 --dist loadfile --thorough

lint: $(INSTALLED)  ## ruff and the rooms' contract, as CI runs them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

bench: $(INSTALLED)  ## speed and memory, as ratios measured in one run
	$(BIN)/python -m pip install --quiet -e ".[bench]"
	for name in store "store --augment full" step scaling; do $(BIN)/python -m benchmarks.$$name || exit 1; done

clean:  ## what quickstart made
	rm -rf quickstart

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "spark-dist needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar on -e ".[test]"
	touch $@
