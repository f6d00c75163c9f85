# `make serve` and `make test` do their own set-up; everything they need is declared in pyproject.toml.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEMO   := $(VENV)/.demo
ARGS   ?=

.PHONY: serve test lint format setup clean

serve: $(DEMO)
	$(BIN)/slipstream serve demo $(ARGS)

# Three at a time, which keep two cores busy: many a test waits for a process that it has started. In the order of
# tests/conftest.py, not that of xdist, where files of few and long tests come last. Tests that start clusters or kill
# processes come after these, two at a time. Hundreds of processes are started, which would compile what they import, so
# none is to leave out the cache.
ALONE  := tests/e2e tests/chaos

test: export PYTHONDONTWRITEBYTECODE :=
test: $(DEMO)
ifeq ($(strip $(ARGS)),)
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ALONE:%=--ignore=%)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ALONE)
else
	$(BIN)/python -m pytest $(ARGS)
endif

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(DEMO)

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Slipstream needs Python 3.11 or newer; run make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

$(DEMO): $(READY)
	$(BIN)/slipstream models pull demo
	$(BIN)/python -m engine.native
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
