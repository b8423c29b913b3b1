# Every command works by itself on a fresh machine with Python 3.11 or newer, pip and make: what it
# needs is installed into .venv first, once, and again when pyproject.toml has changed.
PYTHON ?= python3
BIN := .venv/bin
LOW := .venv-lowest/bin
TPU := .venv-tpu/bin
DOCS := .venv-docs/bin

.DEFAULT_GOAL := help
.PHONY: help venv demo test evidence fuzz parity lint types build lowest tpu docs links clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: .venv/.installed  ## create .venv and install the package with all that development needs

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python"; exit 1; }
	@echo "Installing into .venv (once; a few minutes) ..."
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: venv  ## train a network on real data with many methods; a table, pictures and a report
	@$(BIN)/python -m optax_mtl.experiments compare

test: venv  ## run the tests, the docstrings' examples and the notebooks
	@$(BIN)/python -m pytest -n 2 --dist loadgroup

evidence: venv  ## put the papers' claims to the test: the pages, figures and CSV files in docs/evidence; goes on if interrupted
	@$(BIN)/python -m optax_mtl.experiments experiment all --out docs/evidence $(ARGS)

fuzz: venv  ## try every method on random gradients, masks and faults; ARGS="-k mgda --hypothesis-seed=1"
	@$(BIN)/python -m pytest -m fuzz tests/test_fuzz.py --hypothesis-profile=fuzz $(ARGS)

parity: venv  ## compare with other libraries' recorded answers; ARGS=--write writes docs/parity.md
	@PYTHONPATH=tests $(BIN)/python -m parity.report $(ARGS)

lint: venv  ## check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: venv  ## check the types
	@$(BIN)/mypy

build: venv  ## build the wheel and the sdist, and check what is in them
	@rm -rf dist
	@log=$$($(BIN)/python -m build --installer uv 2>&1) || { echo "$$log"; exit 1; }
	@$(BIN)/python .ci/check_wheel.py dist

# What is on trial here is whether the old versions have all we use: XLA need not optimise for that.
lowest: venv  ## run the laws under the lowest declared versions
	@echo "Installing the lowest declared versions into .venv-lowest ..."
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-lowest
	@$(BIN)/uv pip install --quiet --python $(LOW)/python --resolution lowest-direct --editable '.[test]'
	@$(LOW)/python .ci/check_lowest.py
	@JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(LOW)/python -m pytest -n 2 --dist loadgroup tests/test_laws.py

# In an environment of its own: wherever libtpu is installed, JAX looks for TPUs first.
tpu: venv  ## compile every method and oracle for TPUs, on this machine
	@echo "Installing libtpu, and the rest, into .venv-tpu ..."
	@test -x $(TPU)/python || $(BIN)/uv venv --quiet --python $(BIN)/python .venv-tpu
	@$(BIN)/uv pip install --quiet --python $(TPU)/python --editable '.[test,tpu-aot]'
	@JAX_PLATFORMS=cpu $(TPU)/python -m pytest -m tpu tests/test_tpu.py

# In an environment of its own, which holds the package, Sphinx and no test's needs.
docs: venv  ## build the site into docs/_build, warnings being errors
	@echo "Installing Sphinx, and the package, into .venv-docs ..."
	@test -x $(DOCS)/python || $(BIN)/uv venv --quiet --python $(BIN)/python .venv-docs
	@$(BIN)/uv pip install --quiet --python $(DOCS)/python --editable '.[docs]'
	@rm -rf docs/_build docs/notebooks
	@JAX_PLATFORMS=cpu $(DOCS)/sphinx-build --builder html --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

links: docs  ## try every link of the site; needs a network
	@$(DOCS)/sphinx-build --builder linkcheck --quiet docs docs/_build/links

clean:  ## remove what the commands left behind, .venv excepted
	@rm -rf dist docs/_build docs/notebooks .venv-lowest .venv-tpu .venv-docs .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
