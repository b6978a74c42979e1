# Everything runs in a virtual environment made here; `make demo` and `make test` need nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
# Tests are single-threaded, so two processes share two cores; a file stays in one, with its fixtures.
WORKERS ?= 2
SPREAD := -n $(WORKERS) --dist loadfile

# Byte code is kept, also where the environment says otherwise: every process that tests start would
# compile the packages again, and the slow tests all that the others have compiled.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint types slow docs clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[test]" -c constraints.txt
	touch $@

demo: $(VENV)/.installed
	$(BIN)/analysis demo --out $(DEMO) --overwrite

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(SPREAD)

slow: $(VENV)/.installed
	$(BIN)/python -m pytest $(SPREAD) -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) demo build site *.egg-info

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
