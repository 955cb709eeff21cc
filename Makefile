# make setup     create the virtual environment (.venv)
# make demo      run a sweep on real digits: the best trial's 5 fine-tuned steps are better than any free sampler of
#                their model; DEMO=--from-scratch also pretrains the model, which takes minutes
# make test      check format, lint, types and import contracts, and run the tests
# make test-all  the same, including the slow tests, which take an hour
# make test-gpu  run the tests that need a GPU and are skipped otherwise
# make quick     lint, types and the tests of the core, in less than a minute: while you write
# make check     check only format, lint, types and import contracts

PYTHON ?= python3
BIN := .venv/bin
# Keep compiled bytecode regardless of the environment; otherwise every process would recompile its libraries.
unexport PYTHONDONTWRITEBYTECODE

PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart=0
.DEFAULT_GOAL := help
.PHONY: help setup demo quick test test-all test-gpu tests check clean

help:
	@sed -n 's/^# \(make .*\|  .*\)/\1/p' Makefile

setup: .venv/.ready

# uv is ten times as fast as pip but does not read pip's configuration, so the package index is passed to it.
pip_setting = $$($(BIN)/python -m pip config get $(1) 2>/dev/null)
UV_FROM_PIP = \
	UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$(call pip_setting,global.index-url)}}" \
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-$(call pip_setting,global.find-links)}}"

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "dxmi needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 setup"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(UV_FROM_PIP) $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]' \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/dxmi sweep experiment=digits sweep=demo 'evaluate.full_steps=[50]' $(DEMO)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The checks run in parallel with the tests: mypy, which dominates their time, uses one core.
test: setup
	@$(MAKE) --no-print-directory -j2 check tests

test-all: setup
	@$(MAKE) --no-print-directory -j2 check tests MARKS="-m ''"

QUICK := golden algorithm algorithms policy_gradient directions fit batches states sampler oracle identity light_imports
quick: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile $(QUICK:%=tests/test_%.py)

# One process compiles what the tests import; on a fresh machine all of them would otherwise do it at the same time.
.venv/.compiled: .venv/.ready
	@$(BIN)/python -m pytest --collect-only -q >/dev/null 2>&1 || true
	@touch $@

tests: setup .venv/.compiled
	$(PYTEST) $(MARKS)

test-gpu: setup
	DXMI_TEST_GPU=1 $(BIN)/python -m pytest tests/test_gpu.py

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
