# Everything runs from .venv, which the first command makes. `make demo` and `make test` each need nothing but python3
# (>= 3.10), make and g++; what is done is not done again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py roberta_kernels/schemas.def $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)
PYTHON_FILES := roberta_kernels tests benchmarks setup.py
CPP_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cpp csrc/cuda/*.cu csrc/cuda/*.h csrc/cuda/*.cuh tests/cuda_emulation/*.h tests/cuda_emulation/*.cuh tests/cuda_emulation/*.cpp)
PYTEST := $(BIN)/python -m pytest
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format test-fast test-slow bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# torch comes first and by its pinned version: the build compiles against it, without isolation.
$(VENV)/.packages: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, and this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools wheel ninja packaging numpy
	touch $@

$(VENV)/.built: $(VENV)/.packages $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev,demo,bench]'
	touch $@

setup: $(VENV)/.built  ## make .venv, install what constraints.txt pins, build the kernels

demo: setup  ## a RoBERTa-size model on real text, original against patched; pictures in demo-output/
	$(BIN)/roberta-kernels demo

test: lint test-fast test-slow  ## all checks and all tests

lint: setup  ## ruff, mypy, clang-format
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: setup  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/clang-format -i $(CPP_FILES)

test-fast: setup  ## the tests that take seconds
	$(PYTEST) -n $(WORKERS) -m "not slow"

test-slow: setup  ## the tests that take minutes
	$(PYTEST) -n $(WORKERS) -m slow

bench: setup  ## kernel benchmarks: JSON, a table and plots in benchmarks/results/
	$(BIN)/python -m benchmarks run

clean:  ## remove what was built, and .venv
	rm -rf $(VENV) build dist *.egg-info roberta_kernels/*.so roberta_kernels/build_report.json demo-output
