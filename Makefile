# Two commands on a fresh machine with Python 3 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SUPPORT := $(VENV)/.installed-support

.PHONY: demo test test-newest support lint clean

demo: $(STAMP)
	$(BIN)/python examples/quickstart.py

# Tests run on one thread each, two files at a time.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

# The same with the newest release of every dependency, in an environment of its own; not in CI.
test-newest: $(STAMP)
	$(BIN)/python benchmarks/newest.py

# Every promise on some 430 models of a dozen packages. Rows of which nothing changed are not done again.
support: $(SUPPORT)
	$(BIN)/python benchmarks/support.py --jobs 2

lint: $(STAMP)
	$(BIN)/ruff check sedona_fx tests examples benchmarks
	$(BIN)/ruff format --check sedona_fx tests examples benchmarks
	$(BIN)/mypy

# torch and torchvision together, from the registry: pip then resolves a pair that fits.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

# The packages of the models that the support table is about; no other target needs them.
$(SUPPORT): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,support]"
	touch $(SUPPORT)

clean:
	rm -rf $(VENV) .venv-newest runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
