# make train   on a fresh machine: makes .venv, installs, builds the C++ core, trains on the embedded images
# make test    likewise, and runs the tests
# make bench   likewise, and runs the benchmarks
# make gpu     on a machine with a GPU, where adaclip is installed: tests and benchmarks of it, in under 8 minutes
# Needs Python >= 3.10 with venv, make and a C++17 compiler. Repeated calls do only what has changed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Passed to pip as it stands: TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu' is smaller.
TORCH ?= torch==2.13.0
# More arguments for `adaclip train`, for example ARGS='--epsilon 1'.
ARGS ?=
DATA ?= data

VENV := .venv
BIN := $(VENV)/bin
# With .venv/bin in front: the build calls the cmake and ninja that were installed there.
PIP := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check
CORE := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
FORMATTED := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')

# What runs on a GPU: .venv if it is made, else the Python that adaclip was installed in: an active environment's.
GPU_PYTHON ?= $(if $(wildcard $(VENV)/.installed),$(CURDIR)/$(BIN)/python,python3)

.PHONY: train mnist test bench gpu sanitize-gpu lint format clean

train: $(VENV)/.installed
	$(BIN)/adaclip train --dataset mnist-mini $(ARGS)

# The full MNIST: the official files are looked for in DATA, and downloaded where they are missing.
mnist: $(VENV)/.installed
	$(BIN)/adaclip train --dataset mnist --data-dir $(DATA) --download $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest

# Every benchmark checks its result before it times anything.
bench: $(VENV)/.test
	$(BIN)/python -m pytest bench/bench_*.py -o addopts= -o 'python_functions=bench_* test_*' \
		--benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-sort=name -s

# Writes bench/results/gpu-<name>-<date>.json and .md after every measurement; ARGS='--only conv' for a part of it.
gpu:
	$(GPU_PYTHON) -m bench.gpu $(ARGS)

# In tests/: the folder above would hide an installed adaclip behind its sources. Without torch's cache of memory every
# tensor is an allocation of its own, whose ends memcheck knows. Without a GPU or the kernels it fails, and skips nothing.
sanitize-gpu:
	cd tests && for tool in memcheck racecheck synccheck; do \
		ADACLIP_NEEDS_CUDA=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(GPU_PYTHON) -m pytest -p no:cacheprovider test_cuda_kernels.py || exit 1; \
	done

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

clean:
	rm -rf $(VENV) build adaclip.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find adaclip -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- stamps: each is touched when what it stands for is in .venv ---

$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "adaclip needs Python >= 3.10")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: $(VENV)/.made
	$(PIP) $(TORCH)
	$(PIP) 'setuptools>=77' 'pybind11>=2.13' 'cmake>=3.22' ninja
	touch $@

# Built with what is in .venv already: an isolated build would fetch the build tools a second time.
$(VENV)/.installed: $(VENV)/.torch $(CORE)
	$(PIP) --no-build-isolation -e .
	touch $@

# By name: pip finds adaclip installed and adds the extra alone, where -e '.[test]' would compile the core again.
$(VENV)/.test: $(VENV)/.installed
	$(PIP) 'adaclip[test]'
	touch $@

$(VENV)/.lint: $(VENV)/.made pyproject.toml
	$(PIP) 'ruff>=0.8' 'clang-format>=18'
	touch $@
