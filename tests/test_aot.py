"""Every Triton kernel compiled to machine code for GPUs that are not there, and what it takes of them.

In processes of their own: here Triton is set to interpret, and then it compiles nothing.
"""

import ast
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import adaclip.kernels

CAPABILITIES = {80: 163 << 10, 90: 227 << 10}  # bytes of shared memory that a block can have
FOLDER = Path(adaclip.kernels.__file__).parent


def start(*arguments, **environment):
    """A Python process that compiles."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # A GPU that is there has no say in what is compiled.
    clean |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *arguments], env=clean, text=True, **pipes)


def finish(process):
    out, err = process.communicate()
    assert process.returncode == 0, f"{out[-2000:]}\n{err[-6000:]}"
    return out


@pytest.fixture(scope="module")
def compiled(pytestconfig):
    """One dict for every variant and architecture; also left in build/triton.jsonl."""
    running = [start("-m", "adaclip.kernels.aot", "90"), start("-m", "adaclip.kernels.aot", "--fewer", "80")]
    lines = [line for process in running for line in finish(process).splitlines()]
    record = pytestconfig.rootpath / "build" / "triton.jsonl"
    record.parent.mkdir(exist_ok=True)
    record.write_text("\n".join(lines) + "\n")
    return [json.loads(line) for line in lines]


def launches(path):
    """Names of the kernels that a module launches: what is called as name[grid](...)."""
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    subscripts = (f.value for f in calls if isinstance(f, ast.Subscript))
    return {name.id for name in subscripts if isinstance(name, ast.Name)}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_that_is_launched_is_compiled(compiled, capability):
    modules = [info.name for info in pkgutil.iter_modules([str(FOLDER)])]
    launched = {(module, name) for module in modules for name in launches(FOLDER / f"{module}.py")}
    built = {(row["module"], row["kernel"]) for row in compiled if row["capability"] == capability}
    assert launched
    assert launched <= built


def test_shared_memory_fits(compiled):
    assert [row for row in compiled if row["shared"] > CAPABILITIES[row["capability"]]] == []


def test_hot_kernels_keep_everything_in_registers(compiled):
    hot = [row for row in compiled if row["hot"]]
    assert hot
    assert [row for row in hot if row["spills"]] == []


def test_numbers_are_those_of_the_machine_code(compiled):
    assert all(8 <= row["registers"] <= 255 for row in compiled)


def test_importing_needs_no_gpu_and_adaclip_no_triton():
    every_kernel = """
import importlib, pkgutil, torch, adaclip.kernels
for info in pkgutil.iter_modules(adaclip.kernels.__path__):
    importlib.import_module(f"adaclip.kernels.{info.name}")
assert not torch.cuda.is_initialized()
"""
    without = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import adaclip.engine, adaclip.ops
assert "adaclip.kernels" not in sys.modules
"""
    for process in [start("-c", every_kernel), start("-c", without)]:
        finish(process)


def test_what_launchers_launch_compiles():
    script = Path(__file__).with_name("dry_launches.py")
    assert len(finish(start(str(script), "90")).splitlines()) == 7


SPILLING = """
import triton, triton.language as tl
from adaclip.kernels.aot import Variant, compile_variant

@triton.jit
def kernel(x, n, BLOCK: tl.constexpr):
    at = x + tl.arange(0, BLOCK)
    value = tl.load(at)
    tl.store(at, value - tl.sum(value, 0) - n)

def needs(block, **more):
    return compile_variant(Variant(kernel, {"x": "*fp32", "n": "i32"}, {"BLOCK": block}, num_warps=1, **more), 80)

small, large = needs(64), needs(2048, options={"maxnreg": 32})
assert small.spills == 0 < large.spills, (small, large)
assert ".target sm_80" in small.ptx
for signature in ({"x": "*fp32"}, {"x": "*fp32", "n": "i32", "m": "i32"}):
    try:
        compile_variant(Variant(kernel, signature, {"BLOCK": 64}), 80)
    except ValueError as error:
        assert "kernel takes" in str(error)
    else:
        raise AssertionError("a wrong signature was compiled")
"""


def test_a_kernel_that_spills_is_noticed(tmp_path):
    path = tmp_path / "spilling.py"  # triton reads a kernel's source from its file
    path.write_text(SPILLING)
    finish(start(str(path)))


def test_nothing_is_compiled_in_the_interpreter():
    process = start("-m", "adaclip.kernels.aot", "80", TRITON_INTERPRET="1")
    _, err = process.communicate()
    assert process.returncode != 0
    assert "TRITON_INTERPRET" in err
