# Everything runs in .venv, which each target makes if it is not there.
#   make smoke                 a real script, patched, checked, rendered, trained for five steps, verified, recorded
#   make tune BUDGET=24GiB     the best settings under a memory budget, found by few and short runs
#   make test                  all tests
#   make patch SCRIPT=my.sh    any target on a script of your own (in place); the default is the plan's, on a copy in build/

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEFAULT := original_scripts/train_mgm_2b_stage_1_10k_baseline.sh
SCRIPT ?= $(DEFAULT)
SMOKE_OPTIONS ?=
BUDGET ?= 24GiB
TUNE_OPTIONS ?=
# Test files at a time. Every worker loads torch and trains, some of it on two ranks: one worker for each core, no more.
# A file's tests share what they train, so a file is not divided; tests/conftest.py puts the longest first.
WORKERS ?= 2
TEMPLATES := $(filter-out stage,$(patsubst templates/%.sh.j2,%,$(wildcard templates/*.sh.j2)))
RUFF := --target-version py310 --line-length 128 --select E,F,W,I,B,UP --ignore B905
export PATH := $(abspath $(BIN)):$(PATH)
export DS_BUILD_OPS := 0

# The default script runs in the demo toolkit, on a copy; somebody's own script runs where it is.
DEMO := build/demo
ifeq ($(SCRIPT),$(DEFAULT))
  WORK := $(DEMO)/toolkit/$(notdir $(DEFAULT))
  PATCHED := build/$(notdir $(DEFAULT))
else
  WORK := $(SCRIPT)
  PATCHED := $(SCRIPT)
endif

.PHONY: patch smoke tune full check test lint bench clean
.DELETE_ON_ERROR:

$(VENV)/patching: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "setuptools>=64" wheel
	$(BIN)/python -m pip install -q --no-build-isolation -e .
	touch $@

# torch first and alone; deepspeed is built against it, without compiling its operators.
$(VENV)/training: $(VENV)/patching
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q numpy psutil ninja packaging py-cpuinfo
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[train]"
	touch $@

$(VENV)/testing: $(VENV)/training
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[test,lint]"
	touch $@

build/$(notdir $(DEFAULT)): $(DEFAULT)
	mkdir -p build
	cp $< $@

$(DEMO)/toolkit/$(notdir $(DEFAULT)): $(VENV)/training
	$(BIN)/lorapatch demo $(DEMO)

patch: $(VENV)/patching $(PATCHED)
	$(BIN)/lorapatch patch $(PATCHED)

smoke: $(VENV)/training $(WORK)
	$(BIN)/lorapatch smoke $(WORK) $(SMOKE_OPTIONS)

tune: $(VENV)/training $(WORK)
	$(BIN)/lorapatch tune $(WORK) --budget $(BUDGET) $(TUNE_OPTIONS)

full: $(VENV)/training $(WORK)
	$(BIN)/lorapatch full $(WORK)

check: $(VENV)/patching
	rm -rf build/check && mkdir -p build/check
	for name in $(TEMPLATES); do $(BIN)/lorapatch render $(DEFAULT) --template $$name -o build/check/$$name.sh || exit 1; done
	$(BIN)/lorapatch check original_scripts/*.sh build/check/*.sh $(if $(filter $(DEFAULT),$(SCRIPT)),,$(SCRIPT))

test: $(VENV)/testing
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/testing
	$(BIN)/ruff check $(RUFF) lorapatch tests benchmarks
	$(BIN)/mypy

bench: $(VENV)/testing
	for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
