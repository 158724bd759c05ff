"""The CUDA sources compile for every supported architecture, and their machine code is what it should be.

Needs nvcc, no GPU. Which switches build them is tested with or without nvcc.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adaclip import _core

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = ["sm_80", "sm_90"]
NVCC = shutil.which("nvcc")


def disassembler():
    """cuobjdump of the toolkit, or the one that comes with triton."""
    places = [str(Path(NVCC).resolve().parent)] if NVCC else []
    try:
        import triton

        places.append(str(Path(triton.__file__).parent / "backends/nvidia/bin"))
    except ImportError:
        pass
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(places))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{(stem, architecture): (what ptxas says, cubin)} of every source."""
    if NVCC is None:
        pytest.skip("nvcc was not found")
    folder = tmp_path_factory.mktemp("cubin")

    def compile_one(job):
        source, architecture = job
        cubin = folder / f"{source.stem}.{architecture}.cubin"
        command = [NVCC, "-std=c++17", "-O3", "-I", ROOT / "csrc", f"-arch={architecture}", "-Xptxas", "-v"]
        done = subprocess.run(
            [*command, "-Werror", "all-warnings", "-cubin", "-o", cubin, source],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr, cubin

    jobs = [(source, architecture) for source in SOURCES for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip([(s.stem, a) for s, a in jobs], pool.map(compile_one, jobs), strict=True))


@pytest.fixture(scope="module")
def machine_code(compiled):
    """{(stem, architecture): {kernel: its instructions}}."""
    tool = disassembler()
    if tool is None:
        pytest.skip("cuobjdump was not found")

    def kernels(cubin):
        text = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
        parts = re.split(r"^\s*Function : (\S+)\s*$", text, flags=re.M)[1:]
        return dict(zip(parts[::2], parts[1::2], strict=True))

    return {key: kernels(cubin) for key, (_, cubin) in compiled.items()}


def test_there_are_sources():
    assert {s.stem for s in SOURCES} >= {"conv_sample_norms", "noisy_step"}


def test_nothing_spills(compiled):
    for key, (said, _) in compiled.items():
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
        assert spills, key
        assert set(spills) == {"0"}, (key, said)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_convolution_norms_use_tensor_cores_and_asynchronous_copies(machine_code, architecture):
    kernels = machine_code["conv_sample_norms", architecture]
    assert len(kernels) == 6
    products = [set(re.findall(r"HMMA\.[\w.]+", code)) for code in kernels.values()]
    for instruction in ("HMMA.16816.F32.BF16", "HMMA.16816.F32", "HMMA.1688.F32.TF32"):
        assert sum(instruction in found for found in products) == 2, products
    for code in kernels.values():
        assert re.search(r"LDGSTS\.E\.BYPASS[\w.]*\.128", code)
        assert re.search(r"LDSM\.16\.M88\.4", code)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_noisy_step_moves_16_bytes_at_a_time(machine_code, architecture):
    for code in machine_code["noisy_step", architecture].values():
        assert re.search(r"LDG\.E[\w.]*\.128", code)
        assert re.search(r"STG\.E[\w.]*\.128", code)


def test_no_kernel_uses_atomics(machine_code):
    # Their order changes from run to run, and with it the bits of a sum.
    for kernels in machine_code.values():
        for code in kernels.values():
            assert not re.search(r"\b(ATOM|ATOMG|ATOMS|RED)\b[.\w]*", code)


def configure(tmp_path, switch):
    """What CMake says with ADACLIP_CUDA=switch where there is no nvcc."""
    cmake = shutil.which("cmake")
    pybind11 = pytest.importorskip("pybind11")
    if cmake is None:
        pytest.skip("cmake was not found")
    folders = [d for d in os.environ["PATH"].split(os.pathsep) if not (Path(d) / "nvcc").exists()]
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_PATH")}
    command = [cmake, ROOT, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DADACLIP_CUDA={switch}"]
    return subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment | {"PATH": os.pathsep.join(folders)},
    )


@pytest.mark.parametrize(
    ("switch", "works", "says"),
    [
        ("AUTO", True, "CUDA kernels: not built: nvcc was not found"),
        ("OFF", True, "CUDA kernels: not built: it was built with ADACLIP_CUDA=OFF"),
        ("ON", False, "ADACLIP_CUDA=ON, but nvcc was not found"),
        ("MAYBE", False, "ADACLIP_CUDA must be AUTO, ON or OFF, got 'MAYBE'"),
    ],
)
def test_switches_without_nvcc(tmp_path, switch, works, says):
    done = configure(tmp_path, switch)
    assert (done.returncode == 0) is works, done.stderr
    assert says in " ".join((done.stdout + done.stderr).split())


def test_the_module_says_what_it_was_built_with():
    assert _core.CUDA_NOTE
    assert hasattr(_core, "cuda") is _core.CUDA_BUILT


@pytest.mark.skipif(not _core.CUDA_BUILT, reason=f"CUDA kernels are not built: {_core.CUDA_NOTE}")
def test_the_built_module_answers_without_a_gpu():
    same = ((1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1), 1)
    refusal = _core.cuda.conv_sample_norms_refusal
    assert refusal(4, 8, 8, (1, 16, 16), (1, 16, 16), *same, -1) == ""
    assert "positions, more than 256" in refusal(4, 8, 8, (1, 32, 32), (1, 32, 32), *same, -1)
    # No samples: no launch, and no driver is asked.
    sizes = (0, 8, 8, (1, 4, 4), (1, 4, 4), *same)
    steps = (128, 1, 8)
    _core.cuda.conv_sample_norms(0, 0, *sizes, "bfloat16", steps, steps, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="dtype must be bfloat16, float16 or float32, got int8"):
        _core.cuda.conv_sample_norms(0, 0, *sizes, "int8", steps, steps, 0, 0, 0, 0)
