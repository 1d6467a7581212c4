# `make demo` and `make test` do everything on a fresh machine: virtual environment, install, run.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# e.g. PYTEST_ARGS="tests/callbacks -k ewc"
PYTEST_ARGS ?=
# processes that share the tests; of distributed ones each has two more
JOBS ?= 2

PY := $(VENV)/bin/python
# torch must come from the constraints: an open range may bring another build of several gigabytes
INSTALL := $(PY) -m pip install -qq --disable-pip-version-check --constraint $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest lint format docs bench bench-methods bench-sharded clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/run.stamp  ## learn five tasks with and without forgetting, and write the report
	$(PY) -m lightning_cl.cli.main compare examples/cli/demo.yaml \
		--methods finetune,ewc,er,joint --seeds 3 --jobs 2 --output runs/demo

test: lint  ## ruff, mypy, doctests and tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

test-oldest:  ## the tests on the oldest versions that pyproject.toml claims
	$(MAKE) $(VENV)-oldest/dev.stamp VENV=$(VENV)-oldest CONSTRAINTS=constraints-oldest.txt
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/dev.stamp  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/dev.stamp  ## let ruff mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(VENV)/dev.stamp  ## build the site into site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

bench: $(VENV)/run.stamp  ## the overhead of each callback, as ratios
	OMP_NUM_THREADS=1 $(PY) benchmarks/overhead.py

bench-methods: $(VENV)/run.stamp  ## the cost of every method, as ratios, and over a hundred tasks
	OMP_NUM_THREADS=1 $(PY) benchmarks/methods.py

bench-sharded: $(VENV)/dev.stamp  ## sharded language models against a plain torch loop, as ratios
	$(PY) benchmarks/sharded.py

clean:  ## remove the environments and what the targets wrote
	rm -rf $(VENV) $(VENV)-oldest site build dist runs lightning_logs .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: pyproject.toml $(CONSTRAINTS) | $(PY)
	@echo "Installing into $(VENV); this takes a few minutes the first time."
	$(INSTALL) --editable ".[report,examples]"
	@touch $@

$(VENV)/dev.stamp: pyproject.toml $(CONSTRAINTS) | $(PY)
	@echo "Installing into $(VENV); this takes a few minutes the first time."
	$(INSTALL) --editable ".[all,dev]"
	@touch $(VENV)/run.stamp $@
