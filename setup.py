"""Builds the C++ core, and the CUDA kernels where nvcc is found, with CMake. Everything else about the package is in
pyproject.toml.

A dozen lines instead of a build back end: the package then installs with
`pip install --no-build-isolation --no-deps .` wherever setuptools, pybind11 and CMake are there.
"""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            str(Path(__file__).resolve().parent),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DCMAKE_BUILD_TYPE=Release",
            # Named even when it is unset: a build folder remembers what it was told before.
            f"-DADACLIP_CUDA={os.environ.get('ADACLIP_CUDA', 'AUTO').upper()}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, cwd=build, check=True)
        jobs = str(self.parallel or os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", ".", "--parallel", jobs], cwd=build, check=True)


setup(
    # Here and not in pyproject.toml, whose search for packages does not know that kernels/ is adaclip.kernels.
    packages=[*find_packages(include=["adaclip", "adaclip.*"]), "adaclip.kernels"],
    package_dir={"adaclip.kernels": "kernels"},
    ext_modules=[Extension("adaclip._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
