# Front doors. Each works alone on a fresh clone: it makes .venv, installs what it needs, and runs.
PYTHON ?= python3
OUT    ?= out/demo
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test check bench docs help clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

# One stamp per extra: an install runs again only when pyproject.toml changes.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2])' \
	  || { echo "smark_jax needs Python 3.11 or newer: try 'make PYTHON=python3.11 ...'"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-%: pyproject.toml | $(VENV)/bin/python
	@echo "Installing smark-jax[$*] into $(VENV) (a minute or two, once) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@

demo: $(VENV)/installed-demo  ## train on 4 parties, issue 20 copies, trace a leak; results in OUT=out/demo
	$(BIN)/smark demo --out "$(OUT)"

test: $(VENV)/installed-test  ## the test suite, notebooks included
	$(BIN)/python -m pytest -n 2 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder \
	  --nbmake --nbmake-timeout=300 $(PYTEST_ARGS)

check: $(VENV)/installed-dev  ## ruff, pyright, import-linter
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(VENV)/installed-bench  ## against PyTorch and the machine itself; results in out/benchmarks (BENCH_ARGS="--config full")
	$(BIN)/python -m experiments.benchmarks $(BENCH_ARGS)

docs: $(VENV)/installed-docs  ## the documentation, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:  ## remove .venv and outputs
	rm -rf $(VENV) out
