# make demo   sets up and sweeps on real digits: 5-step samplers overtake the 1000-step model they came from
# make test   sets up, then format, lint, types, import contracts and tests
# make check  format, lint, types and import contracts alone
# make setup  the virtual environment alone

PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup demo test check clean

help:
	@sed -n 's/^# //p' Makefile

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "dxmi needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 setup"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/dxmi sweep experiment=digits sweep=demo

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart=0

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
