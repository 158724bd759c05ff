#!/usr/bin/env bash
# Builds the core under sanitizers and runs its checks: `make sanitize`. Needs g++; SANITIZE_PYTHON is the Python
# that the tests run in.
#
# 1. Every kernel, on every instruction set of this CPU, against the definition (core_checks), from several threads:
#    once under the address and undefined-behavior sanitizers, once under the thread sanitizer.
# 2. The core's own Python tests on a module built with the address and undefined-behavior sanitizers.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${SANITIZE_PYTHON:-python3}
export CC=gcc CXX=g++
export UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1

for kind in address,undefined thread; do
  echo "core_checks under $kind"
  cmake -S tests/sanitize -B "build/sanitize/$kind" -G Ninja "-DSANITIZE=$kind" > /dev/null
  cmake --build "build/sanitize/$kind" > /dev/null
  "build/sanitize/$kind/core_checks"
done

echo "the core's Python tests under address,undefined"
cmake -S . -B build/sanitize/module -G Ninja -DCMAKE_BUILD_TYPE=Release -DADACLIP_SANITIZE=address,undefined \
  -DADACLIP_CUDA=OFF "-DPython_EXECUTABLE=$python" \
  "-Dpybind11_DIR=$("$python" -c 'import pybind11; print(pybind11.get_cmake_dir())')" > /dev/null
cmake --build build/sanitize/module > /dev/null
# The Python that loads the module was not linked to the sanitizer, so that it has to be loaded first; libstdc++
# beside it, or the sanitizer cannot follow exceptions. Python and torch keep memory to the end: no leak is theirs
# to mend here.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 ADACLIP_SANITIZED_CORE=$(echo build/sanitize/module/_core*.so) \
  PYTHONPATH=tests/sanitize "$python" -m pytest -p sanitized_core -p no:cacheprovider \
  -k "not ten_million and not twenty_steps" \
  tests/test_chacha20.py tests/test_core_*.py tests/test_noise.py tests/test_noisy_step.py tests/test_clip_ops.py
