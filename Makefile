# Each target alone works on a fresh machine: it creates .venv, installs, and does its job.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: reproduce test lint bench
reproduce: .venv/installed
	$(BIN)/noisebench reproduce elr

test: .venv/installed-dev
	$(BIN)/python -m pytest

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed-dev
	$(BIN)/python -m pytest tests/benchmarks -s -o addopts="-q" --benchmark-columns=median,min,rounds

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "noisebench needs Python 3.11 or newer, found " + sys.version.split()[0] + "; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet -e '.[dev,llm,eval]'
	touch $@
