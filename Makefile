# On a machine that has Python 3.10 or later, pip and make:
#   make demo    train the small demonstration (minutes, no network after the installation)
#   make test    run the tests
#   make docs    build the documentation into outputs/site
#   make lint types readme    style, the types of the public API, the commands that README.md and docs/ mark as run
# The first call makes .venv and installs into it what constraints.txt pins: `make demo` what the demonstration needs,
# `make test` the rest as well. A second call installs nothing.
# make test PYTHON=/path/to/python uses another environment as it is and installs nothing into it.

VENV := .venv
TEST_PROCESSES ?= 2
DEMO_OPTIONS ?=
TEST_OPTIONS ?=

ifeq ($(origin PYTHON), undefined)
  PYTHON := $(VENV)/bin/python
  FOR_DEMO := $(VENV)/.installed-demo
  FOR_DEVELOPMENT := $(VENV)/.installed-dev
else
  FOR_DEMO :=
  FOR_DEVELOPMENT :=
endif

# The checkout is importable in an environment that it was not installed into; one thread per test process.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
export TOKENIZERS_PARALLELISM := false
test test-slow: export OMP_NUM_THREADS := 1

.PHONY: demo test test-slow test-oldest lint types readme docs clean

demo: $(FOR_DEMO)
	$(PYTHON) scripts/demo.py $(DEMO_OPTIONS)

test: $(FOR_DEVELOPMENT)
	$(PYTHON) -m pytest -n $(TEST_PROCESSES) $(TEST_OPTIONS)

test-slow: $(FOR_DEVELOPMENT)
	$(PYTHON) -m pytest -n $(TEST_PROCESSES) -m slow $(TEST_OPTIONS)

# The oldest versions of transformers and accelerate that the package allows, in an environment of their own.
test-oldest:
	test -x $(VENV)-oldest/bin/python || python3 -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --constraint constraints-oldest.txt --editable '.[scripts]' pytest
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest tests/trainer/test_smoke.py

lint: $(FOR_DEVELOPMENT)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: $(FOR_DEVELOPMENT)
	$(PYTHON) -m mypy

readme: $(FOR_DEVELOPMENT)
	$(PYTHON) tests/repository/run_readme.py

# A link that leads nowhere, an exported name without a page, or a page that the code has left behind ends it.
docs: $(FOR_DEVELOPMENT)
	$(PYTHON) docs/generate.py --check
	$(PYTHON) -m zensical build --strict

# Without its mark (a first call, a changed pin, an installation that was cut off) pip brings .venv up to date.
$(VENV)/.installed-demo: EXTRA := demo
$(VENV)/.installed-dev: EXTRA := dev
$(VENV)/.installed-%: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable '.[$(EXTRA)]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest outputs/demo build dist .mypy_cache .pytest_cache .ruff_cache
	find hf_v0init scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
