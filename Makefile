# modicum: the two commands that matter are `make demo` and `make test`.
#
#   PYTHON=python3   the interpreter to build the environment from (3.10 or later)
#   VENV=.venv       where the environment goes
#   JOBS=2           pytest workers
#   PYTEST=...       further arguments to pytest, for example PYTEST="-k memory"

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTEST ?=

SHELL := /bin/sh
.SHELLFLAGS := -euc
.DELETE_ON_ERROR:
.SUFFIXES:
.DEFAULT_GOAL := help

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt

.PHONY: demo test lint format smoke clean distclean help

demo: $(VENV)/.stamp-demo ## train, plan, adapt and emit on real digits (under 2 minutes)
	@rm -rf build/quickstart
	$(BIN)/modicum quickstart --out build/quickstart

test: $(VENV)/.stamp-test ## install what the tests need, then lint and test everything
	@scripts/board-tools.sh
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST)

lint: $(VENV)/.stamp-test ## ruff, mypy and the import contracts
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	$(BIN)/mypy --no-error-summary
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.stamp-test ## let ruff rewrite what it can
	$(BIN)/ruff check -q --fix .
	$(BIN)/ruff format -q .

smoke: $(VENV)/.stamp-test ## the torch-free unit tests, under 5 s
	$(BIN)/python -m pytest -x -m "not slow" tests/unit

clean: ## remove what builds and runs left
	rm -rf build dist out .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean ## clean, and remove the environment too
	rm -rf "$(VENV)"

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' Makefile | while IFS='	' read -r target what; do \
	    printf '  make %-10s %s\n' "$$target" "$$what"; done

# Stamps: a second run installs nothing; a change of the pins or the metadata installs again.
# torch goes first and alone, so that nothing else chooses its version. setuptools, which the
# package is built with, comes from the pins too: hence no isolated build environment.

$(VENV)/.stamp-torch: constraints.txt scripts/make-venv.sh
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || scripts/make-venv.sh "$(PYTHON)" "$(VENV)"
	@echo "installing torch"
	@$(PIP) torch==2.13.0 setuptools
	@touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-torch pyproject.toml
	@echo "installing modicum"
	@$(PIP) --no-build-isolation -e ".[digits]"
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-torch pyproject.toml
	@echo "installing modicum and its test tools"
	@$(PIP) --no-build-isolation -e ".[digits,dev]"
	@touch $@ $(VENV)/.stamp-demo
