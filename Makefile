# One target per habit; `.ci/run` and CONTRIBUTING.md use the same ones.
# `make test` and `make demo` need nothing but Python 3.11 (with venv), git and make: they set up what they use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help install system fmt lint type contracts check test unit cluster-test cluster chaos bench docs demo stop-table \
        constraints image-locks build clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

install: $(STAMP) ## create the environment in .venv (again when the project file changes)

# The stamp is written last, so an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "orch needs Python 3.11 or newer: make PYTHON=...")'
	@echo "Setting up $(VENV) (the first time: a few minutes, most of it PyTorch)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[jobs,s3,dev]'
	@touch $@

system:
	@sh tests/setup_system.sh

fmt: $(STAMP) ## format the code
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

lint: $(STAMP) ## style of code and shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/shellcheck tests/setup_system.sh .ci/run

type: $(STAMP) ## mypy, strict on orchestrator
	$(BIN)/mypy

contracts: $(STAMP) ## import directions (.importlinter)
	$(BIN)/lint-imports

check: lint type contracts ## lint, type and contracts

# Clusters are private, so each test process starts its own; most of a test's time is waiting for Slurm, and the one long test
# without a cluster runs beside them. Tests that measure time come first and alone. What Slurm itself decides is shown on a
# second release, too (a minute more the first time).
CLUSTERS := 4
OTHER_SLURM := 24.11
LONG_TEST := tests/chaos/test_random_stops.py
CLUSTER_TESTS = \
	$(PYTEST) -m alone tests/cluster || status=$$?; \
	$(PYTEST) --numprocesses $(CLUSTERS) --dist worksteal -m 'not alone' $(LONG_TEST) tests/cluster || status=$$?; \
	ORCH_TEST_SLURM=$(OTHER_SLURM) $(PYTEST) --numprocesses $(CLUSTERS) --dist worksteal \
	    -m other_slurm tests/cluster || status=$$?

test: $(STAMP) system ## every test, the real cluster included where the machine allows it
	@status=0; \
	$(PYTEST) --numprocesses 2 --dist worksteal -m 'not cluster' --deselect $(LONG_TEST) || status=$$?; \
	$(CLUSTER_TESTS); \
	exit $$status

unit: $(STAMP) ## the tests that need neither Slurm nor an engine
	$(PYTEST) --numprocesses 2 --dist worksteal -m 'not cluster'

cluster-test: $(STAMP) system ## the tests on the real cluster
	@status=0; \
	$(CLUSTER_TESTS); \
	exit $$status

cluster: $(STAMP) system ## start the test cluster by hand; Ctrl-C ends it
	@$(BIN)/python -m tests.cluster

chaos: $(STAMP) ## kill, pause and starve saves and whole runs many more times than `make test` does
	ORCH_CHAOS_KILLS=1000 ORCH_CHAOS_OBJECT_KILLS=60 ORCH_CHAOS_PUSH_KILLS=42 \
	    ORCH_CHAOS_RACES=400 ORCH_CHAOS_OBJECT_RACES=200 ORCH_CHAOS_FAULTY_ATTEMPTS=20 \
	    ORCH_CHAOS_FAULT_STEP=1 ORCH_CHAOS_STOPS=100 \
	    $(PYTEST) --numprocesses 2 --dist worksteal --durations 30 -o faulthandler_timeout=3600 \
	    $(LONG_TEST) $(filter-out $(LONG_TEST), $(sort $(wildcard tests/chaos/test_*.py))) tests/objects

bench: $(STAMP) ## the figures in benchmarks/
	@for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python "$$file" || exit 1; done

stop-table: $(STAMP) system ## measure every stop on the real cluster again, and write the table in docs/preemption.md
	@rm -f stops.new; \
	for version in "" $(OTHER_SLURM); do \
	    ORCH_STOPS="$$PWD/stops.new" ORCH_TEST_SLURM="$$version" $(PYTEST) tests/cluster/test_stops.py || exit 1; \
	done; \
	$(BIN)/python -m tests.cluster.plain_lightning stops.new && $(BIN)/python docs/generate_stop_table.py stops.new && \
	rm stops.new

docs: $(STAMP) ## regenerate the generated pages of docs/
	$(BIN)/python docs/generate_spec_reference.py

demo: $(STAMP) ## the main job on this machine: preempted on purpose in mid-epoch, resumed, finished
	@$(BIN)/python -m jobs.demo

constraints: ## renew constraints.txt from what .venv holds now
	@{ head -n 1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | grep -v -E '^(pip|setuptools)=='; } \
	    > constraints.new && mv constraints.new constraints.txt

# The locks of one image go together: what is in both has the same version. Versions stay unless LOCK_OPTIONS=--upgrade.
# PyTorch's builds for CPU are not on PyPI: UV_FIND_LINKS or UV_INDEX says where they are.
UV ?= uv
LOCK_OPTIONS ?=
LOCK := UV_CUSTOM_COMPILE_COMMAND="make image-locks" $(UV) pip compile --quiet --generate-hashes --no-annotate \
    --only-binary :all: --python-version 3.11 --python-platform x86_64-manylinux_2_28 $(LOCK_OPTIONS)

image-locks: ## renew the hashed locks of containers/ (needs uv)
	cd containers/pretrain && $(LOCK) requirements.in --output-file requirements.lock
	cd containers/pretrain && $(LOCK) requirements-cpu.in --constraint requirements.lock \
	    --output-file requirements-cpu.lock
	cd containers/base && $(LOCK) requirements.in ../../pyproject.toml --extra s3 \
	    --constraint ../pretrain/requirements-cpu.lock --output-file requirements.lock

build: $(STAMP) ## wheel and sdist in dist/
	$(BIN)/python -m build

clean: ## remove everything that make can make again
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache demo_runs
