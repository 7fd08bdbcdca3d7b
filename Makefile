# Everything runs from .venv, which the first command makes. `make demo` and `make test` each need nothing but python3
# (>= 3.10), make and g++; what is done is not done again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A CUDA build of torch, in a venv of its own (5.5 GB), to link and load the CUDA library; no GPU is needed for that.
CUDA_VENV := .venv-cuda
CUDA_TORCH ?= 2.14.1
# Ray, in a venv of its own that finds everything else in .venv: some 500 MB, which nothing but its tests needs.
RAY_VENV := .venv-ray
# sentence-transformers with its backends for ONNX Runtime and OpenVINO, a peer of one benchmark: 2 GB.
OPTIMUM_VENV := .venv-optimum
# A wheel of the package, tried as on a machine without a compiler.
WHEEL_VENV := .venv-wheel
SOURCES := setup.py roberta_kernels/schemas.def $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*.*)
PYTHON_FILES := roberta_kernels tests benchmarks examples csrc release setup.py noxfile.py
CPP_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cpp csrc/cuda/*.cu csrc/cuda/*.h csrc/cuda/*.cuh tests/cuda_emulation/*.h tests/cuda_emulation/*.cuh tests/cuda_emulation/*.cpp tests/cpu/*.cpp benchmarks/*.cpp benchmarks/gpu_suite/*.cu)
PYTEST := $(BIN)/python -m pytest
# Python compiles what is imported, when it is, and keeps it; pip would compile every module of every package.
# One pip, that of .venv, installs into every venv: the one that comes with Python may be years old, and takes three times
# as long to choose versions.
PIP := $(abspath $(BIN))/python -m pip --quiet --disable-pip-version-check
INSTALL := install --no-compile
PIP_INSTALL := $(PIP) $(INSTALL) -c constraints.txt
unexport PYTHONDONTWRITEBYTECODE
export ROBERTA_KERNELS_CUTLASS ?= $(abspath $(VENV)/cutlass/cutlass_library/source)
WORKERS ?= 2
# SHARE=2/3: of the long matrices in test-full the second of three shares.
SHARE ?=
IN_SHARE := $(addprefix --share=,$(SHARE))
# What test-cuda-source and test-cuda-library run.
NOT_CUDA := --ignore=tests/cuda --ignore=tests/cuda_emulation

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format test-full test-fast test-matrices test-releases test-ray wheel sdist test-wheel test-sdist hub-kernel test-hub-kernel test-floor test-newest test-matrix test-cuda-source test-cuda-library cuda-packages cuda-library cuda-emulation bench bench-models bench-rerank gpu-suite gpu-bundle clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 26

# torch comes first and by its pinned version: the build compiles against it, without isolation.
$(VENV)/.packages: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, and this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) torch setuptools wheel ninja packaging numpy
	touch $@

# The kernels, and what the demo needs.
$(VENV)/.built: $(VENV)/.packages $(SOURCES)
	$(PIP_INSTALL) --no-build-isolation -e '.[demo]'
	touch $@

# What the tests and linters need beside that: the requirements of these extras alone, as installing the package again
# would compile it again.
REQUIREMENTS := import sys; from importlib.metadata import requires; from packaging.requirements import Requirement; \
	found = [Requirement(text) for text in requires("roberta_kernels")]; \
	wanted = [one for one in found if one.marker and any(one.marker.evaluate({"extra": extra}) for extra in sys.argv[1:])]; \
	print(*(f"{one.name}{one.specifier}" for one in wanted))

$(VENV)/.tools: $(VENV)/.built $(VENV)/.cutlass
	$(PIP_INSTALL) $$($(BIN)/python -I -c '$(REQUIREMENTS)' dev bench test pretrained)
	touch $@

# Of CUTLASS the headers alone, in a folder of their own: its package depends on much that no header needs, and pip would
# complain of that at every installation.
$(VENV)/.cutlass: constraints.txt $(VENV)/.packages
	$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/cutlass nvidia-cutlass
	touch $@

setup: $(VENV)/.tools  ## make .venv, install what constraints.txt pins, build the kernels

demo: $(VENV)/.built  ## a RoBERTa-size model on real text, original against patched; pictures in demo-output/
	$(BIN)/roberta-kernels demo

test: lint test-fast  ## the checks to wait for: linters, and tests of everything that is promised

test-full: test-matrices test-releases test-cuda-source test-wheel test-hub-kernel  ## what make test leaves out: matrices, compilers, emulations (SHARE=1/3: a third of the matrices)

lint: setup  ## ruff, mypy, clang-format
	$(BIN)/ruff check --no-cache $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: setup  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/clang-format -i $(CPP_FILES)

# One worker has all tests of a file: some have fixtures that take long.
FAST := not full and not cuda_source and not releases and not ray
test-fast: setup  ## the tests of make test
	$(PYTEST) -n $(WORKERS) --dist loadfile -m "$(FAST)" $(NOT_CUDA)

test-matrices: setup $(VENV)/.torchao  ## the rest of the same files: tests that take long, and every combination of parameters
	$(PYTEST) -n $(WORKERS) --dist loadfile $(IN_SHARE) -m "full and not releases and not ray" $(NOT_CUDA) --deselect tests/models/test_quantised.py::test_torchao
	PYTHONPATH=$(VENV)/torchao $(PYTEST) tests/models/test_quantised.py::test_torchao

hub-kernel: setup  ## the layout of Hugging Face's Kernels Hub, in build/hub-kernel, to be uploaded or built by kernel-builder
	$(BIN)/python release/hub_kernel.py

test-hub-kernel: setup $(VENV)/.kernels  ## the same, loaded by the package kernels
	PYTHONPATH=$(VENV)/kernels $(PYTEST) tests/test_hub_kernel.py

# transformers imports torchao and kernels wherever it finds them, which takes seconds, and torchao writes to stderr on a
# machine without a GPU: so each is in a folder of its own, on the path of the tests that need it.
$(VENV)/.kernels: constraints.txt $(VENV)/.packages
	$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/kernels kernels
	touch $@

$(VENV)/.torchao: constraints.txt $(VENV)/.packages
	$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/torchao torchao
	touch $@

test-releases: setup  ## releases of transformers that nobody made yet: the installed one with edited sources
	$(PYTEST) -n $(WORKERS) $(IN_SHARE) tests/releases

# A venv that finds what it lacks in .venv.
define venv_beside
	test -x $(1)/bin/python || $(PYTHON) -m venv --without-pip $(1)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(\"" + sysconfig.get_paths()["purelib"] + "\")")' \
		> "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/packages_of_venv.pth"
endef

$(RAY_VENV)/.packages: constraints.txt $(VENV)/.tools
	$(call venv_beside,$(RAY_VENV))
	$(PIP) --python $(RAY_VENV) $(INSTALL) -c constraints.txt 'ray[data,serve]'
	touch $@

test-ray: setup $(RAY_VENV)/.packages  ## a corpus and a service on a Ray cluster of this machine, in .venv-ray (500 MB)
	$(RAY_VENV)/bin/python -m pytest -n 2 --dist loadfile -m ray tests/cluster

# torch's libraries are where torch is, and no part of the wheel; of the rest auditwheel says how old a Linux may be. What is
# compiled is what `make setup` has compiled.
wheel: sdist  ## a manylinux wheel and an sdist, in dist/ (ROBERTA_KERNELS_CUDA=1: with the CUDA kernels)
	rm -rf build/lib* build/wheel dist/*.whl
	$(PIP) wheel --no-build-isolation --no-deps -w build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*.so' --exclude libc10.so -w dist build/wheel/*.whl

sdist: setup
	rm -f dist/*.tar.gz
	$(BIN)/python -m build --sdist --no-isolation --skip-dependency-check --outdir dist .

# In a venv that finds torch and the rest in .venv, but the package, which is installed from the file. What runs there sees
# no compiler and no other program.
IN_WHEEL_VENV := env -i HOME="$$HOME" PATH=$(abspath $(WHEEL_VENV))/bin
test-wheel: wheel $(WHEEL_VENV)/.made  ## the wheel installed without a compiler, and used; the sdist has every source
	$(WHEEL_VENV)/bin/python release/check_sdist.py dist/*.tar.gz
	$(IN_WHEEL_VENV) $(PIP) --python $(abspath $(WHEEL_VENV)) $(INSTALL) --no-deps --force-reinstall --no-index $(abspath dist)/*.whl
	cd $(WHEEL_VENV) && $(IN_WHEEL_VENV) python $(abspath release/smoke.py) no-compiler

test-sdist: sdist $(WHEEL_VENV)/.made  ## the sdist installed with a compiler, and used; minutes, since it compiles
	$(PIP) --python $(WHEEL_VENV) $(INSTALL) --no-build-isolation --no-deps --force-reinstall dist/*.tar.gz
	cd $(WHEEL_VENV) && bin/python $(abspath release/smoke.py)

$(WHEEL_VENV)/.made: $(VENV)/.packages
	$(call venv_beside,$(WHEEL_VENV))
	touch $@

test-floor: setup  ## the quick model tests with the oldest transformers (noxfile.py), in .nox
	$(BIN)/nox -s floor

test-newest: setup  ## the quick model tests with the newest of everything but torch, in .nox; needs the package index
	$(BIN)/nox -s newest

test-matrix: setup  ## the model tests with every version in noxfile.py; several GB, and hours
	$(BIN)/nox -s models

# A target, or why it cannot be made here.
define with_nvcc
	@if why=$$($(BIN)/python csrc/cuda/cuda_build.py --check); then $(MAKE) --no-print-directory $(1); else echo "$(1) skipped: $$why"; fi
endef

test-cuda-source: setup  ## the CUDA sources: compiled for every architecture, and run on the CPU; needs nvcc, no GPU
	$(PYTEST) -m cuda_source tests/cuda
	$(call with_nvcc,cuda-emulation)

# Of the op tests what make test has, under the sanitizers; then what the emulation and launch planning have for tests of
# their own; then the op tests as a Hopper GPU would run them.
cuda-emulation:
	$(BIN)/python tests/cuda_emulation/build.py -- python -m pytest -n $(WORKERS) $(IN_SHARE) -m "not full" tests/ops -k cuda
	$(BIN)/python tests/cuda_emulation/build.py --plain -- python -m pytest -n $(WORKERS) --dist worksteal $(IN_SHARE) tests/cuda_emulation tests/models/test_encoder_on_cuda.py tests/models/test_graphs.py
	$(BIN)/python tests/cuda_emulation/build.py --plain -- python -m pytest -n $(WORKERS) -p tests.cuda_emulation.hopper tests/ops/test_attention.py tests/ops/test_variants.py -k "cuda and not float32 and not portable and not (gelu and sm90)"

# One wheel, built against the torch of .venv, is what the other torch loads.
test-cuda-library: setup  ## the CUDA library in a CUDA build of torch, in .venv-cuda (5.5 GB); needs nvcc, no GPU
	$(call with_nvcc,cuda-library)

cuda-packages: setup  ## what test-cuda-library installs, where there is nvcc
	$(call with_nvcc,$(CUDA_VENV)/.packages)

$(CUDA_VENV)/.packages: constraints.txt $(VENV)/.packages
	test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv --without-pip $(CUDA_VENV)
	grep -vE '^(torch|triton)==' constraints.txt > $(CUDA_VENV)/constraints.txt
	$(PIP) --python $(CUDA_VENV) $(INSTALL) --no-cache-dir -c $(CUDA_VENV)/constraints.txt \
		torch==$(CUDA_TORCH) transformers numpy packaging rich typer pytest pytest-benchmark
	touch $@

# pytest by its script: with `python -m pytest` the sources here would be imported in the place of the wheel.
cuda-library: $(CUDA_VENV)/.packages
	rm -rf build/lib* build/wheel
	ROBERTA_KERNELS_CUDA=1 $(PIP) wheel --no-build-isolation --no-deps -w build/wheel .
	$(PIP) --python $(CUDA_VENV) $(INSTALL) --no-deps --force-reinstall build/wheel/*.whl
	ROBERTA_KERNELS_CUDA=1 $(CUDA_VENV)/bin/pytest tests/cuda/test_cuda_library.py

bench: setup  ## kernel benchmarks: JSON, a table and plots in benchmarks/results/
	$(BIN)/python -m benchmarks run

# No part of what .venv holds for the tests: 300 MB.
$(VENV)/.peers: $(VENV)/.tools
	$(PIP_INSTALL) $$($(BIN)/python -I -c '$(REQUIREMENTS)' bench-models)
	touch $@

MODELS_ARGS ?=
bench-models: $(VENV)/.peers  ## whole models on a CPU against ONNX Runtime, OpenVINO, ...: some 30 minutes
	$(BIN)/python -m benchmarks models $(MODELS_ARGS)

# No constraints.txt: its transformers is too new for optimum.
$(OPTIMUM_VENV)/.packages: benchmarks/optimum.txt $(VENV)/.packages
	test -x $(OPTIMUM_VENV)/bin/python || $(PYTHON) -m venv --without-pip $(OPTIMUM_VENV)
	$(PIP) --python $(OPTIMUM_VENV) $(INSTALL) -r benchmarks/optimum.txt
	touch $@

RERANK_ARGS ?=
bench-rerank: $(VENV)/.peers $(OPTIMUM_VENV)/.packages  ## CrossEncoder.rank on a CPU, 100 passages, against stock, ONNX Runtime, OpenVINO: minutes
	$(BIN)/python -m benchmarks rerank $(RERANK_ARGS)

OUT ?= bench-output
# Where the packages are there already (a GPU machine without a network): make gpu-suite SUITE_PYTHON=python3
SUITE_PYTHON ?= $(BIN)/python
SLOT ?=
gpu-suite: $(if $(filter $(BIN)/python,$(SUITE_PYTHON)),setup)  ## test, check and measure on the GPU at hand, ten minutes for each SLOT=1, 2, 3; results in OUT=folder
	$(SUITE_PYTHON) -m benchmarks gpu-suite --out $(OUT) $(addprefix --slot ,$(SLOT))

gpu-bundle: setup  ## the CUDA library for a Hopper GPU that gpu-suite need not build then, in gpu-bundle/; needs nvcc, no GPU
	$(BIN)/python -m benchmarks gpu-bundle

clean:  ## remove what was built, and .venv
	rm -rf $(VENV) $(CUDA_VENV) $(RAY_VENV) $(OPTIMUM_VENV) $(WHEEL_VENV) .nox build gpu-bundle dist *.egg-info roberta_kernels/*.so roberta_kernels/build_report.json demo-output
