"""Builds a kernel of csrc/cuda for the CPU, with the stand-ins of cuda_on_host.h."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"


def build(name, calls, folder):
    """csrc/cuda/<name>.cu and the C++ text `calls` after it, as a ctypes library."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = re.sub(r"(\w+)<<<([^,]*), ([^,]*), [^>]*>>>\(", r"launch(\1, \2, \3, ", _text(name))
    assert "<<<" not in source
    # nvcc gives every file the runtime's headers; those that a header asks for by name are empty here.
    (folder / "cuda_runtime_api.h").write_text("")
    (folder / "kernel.cpp").write_text(source + calls)
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-w", "-include"]
    where = [str(HERE / "cuda_on_host.h"), f"-I{folder}", f"-I{CSRC}", "-o", str(folder / "kernel.so")]
    subprocess.run([compiler, *flags, *where, str(folder / "kernel.cpp")], check=True)
    return ctypes.CDLL(str(folder / "kernel.so"))


def _text(name):
    return (CSRC / "cuda" / f"{name}.cu").read_text()
