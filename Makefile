# make demo   everything for one answer: virtual environment, llama.cpp, the runtime, an example
# make test   the whole test suite
# make lint   ruff and mypy
# make bench  every benchmark, writes BENCHMARKS.md
# make fuzz   every fuzzer, MINUTES=5 each
#
# PYTHON=python3.12 make demo   another interpreter (>= 3.11)
# CMAKE_ARGS=-DGGML_CUDA=on make demo   llama.cpp with CUDA

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
.DEFAULT_GOAL := demo

PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3 2>/dev/null))
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# torch's CPU build lives on an index of its own; PyPI's wheel brings several GB of CUDA packages.
TORCH := torch==2.13.0$(if $(filter Linux,$(shell uname -s)),+cpu)
TORCH_INDEX := https://download.pytorch.org/whl/cpu

# GCC 12 optimises the AMX tile configuration away and the process dies with SIGILL on CPUs that
# have AMX; without dead store elimination the code is right and AMX is used. (ggml-org/llama.cpp
# pull request 26954.) Other compilers do not need it.
GCC := $(shell $${CXX:-c++} --version 2>/dev/null | grep -c 'Free Software Foundation')
AMX_FLAGS := $(if $(filter 0,$(GCC)),,-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse')
LLAMA_CMAKE_ARGS := -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF $(AMX_FLAGS) $(CMAKE_ARGS)
# Other flags are another build: make forgets the old one, pip must not reuse it either.
LLAMA := $(VENV)/.llama-$(shell printf '%s' "$(LLAMA_CMAKE_ARGS)" | cksum | cut -d' ' -f1)
REBUILD := $(if $(filter-out $(LLAMA),$(wildcard $(VENV)/.llama-*)),--force-reinstall --no-deps --no-cache-dir)

SOURCES := pyproject.toml CMakeLists.txt $(shell find kernels -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)

.PHONY: demo test check lint bench fuzz clean
demo: $(VENV)/.runtime
	$(BIN)/mse-run examples/happy.mp4 "I am really happy with how this turned out. Thank you so much for everything."

test: $(VENV)/.everything
	$(BIN)/python -m pytest --durations=15

# What to run while editing: no slow tests.
check: $(VENV)/.everything
	$(BIN)/python -m pytest -q -m 'not slow' -x

lint: $(VENV)/.everything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.everything
	$(BIN)/python bench/report.py

# Every fuzzer, MINUTES each: what crashes is kept as a seed.
fuzz: $(VENV)/.everything
	$(BIN)/python -m tests.fuzz all --minutes $(or $(MINUTES),5)

clean:
	rm -rf $(VENV) build dist

$(VENV)/.venv:
	@[ -n "$(PYTHON)" ] || { echo "No Python >= 3.11 found: sudo apt install python3.11 python3.11-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: PYTHON=python3.11 make" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "No C++ compiler found: sudo apt install g++ make" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "Python's venv module is missing: sudo apt install python3.11-venv" >&2; exit 1; }
	@touch $@

$(LLAMA): $(VENV)/.venv
	@echo "Compiling llama.cpp (about five minutes on two cores; log: $(VENV)/llama.log)" >&2
	@CMAKE_ARGS="$(LLAMA_CMAKE_ARGS)" $(PIP) install -v $(REBUILD) 'llama-cpp-python>=0.3.36,<0.4' 2>&1 \
		| $(BIN)/python tools/build_progress.py $(VENV)/llama.log \
		|| { tail -n 30 $(VENV)/llama.log >&2; echo "llama.cpp did not build; the whole log is $(VENV)/llama.log" >&2; exit 1; }
	@rm -f $(VENV)/.llama-*
	@touch $@

$(VENV)/.runtime: $(LLAMA) $(SOURCES)
	$(PIP) install -q -e '.[cpu,llama]'
	@touch $@

$(VENV)/.torch: $(VENV)/.venv
	@echo "Installing $(TORCH)" >&2
	@$(PIP) install -q --retries 0 --timeout 30 '$(TORCH)' --index-url $(TORCH_INDEX) 2>/dev/null \
		|| $(PIP) install -q '$(TORCH)' \
		|| { echo "torch's CPU build was not found; it is on $(TORCH_INDEX)" >&2; exit 1; }
	@touch $@

$(VENV)/.everything: $(VENV)/.runtime $(VENV)/.torch constraints/torch-cpu.txt
	$(PIP) install -q -c constraints/torch-cpu.txt -e '.[cpu,llama,plot,export,ray,test]'
	@touch $@
