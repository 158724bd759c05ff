"""Every test starts from the same global seed, so a failure can be run again.

Triton reads TRITON_INTERPRET when it is imported and whenever a kernel is defined, so it is set here, before
anything that imports triton.
"""

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from core_calls import LEVELS, simd

from adaclip.testing import mend_interpreter

torch.manual_seed(0)  # for the modules that parameter lists make while tests are collected


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=LEVELS)
def simd_level(request):
    """The test runs once on each instruction set that this CPU has."""
    with simd(request.param):
        yield request.param


@pytest.fixture
def gpu_or_interpreter():
    """The device that Triton kernels run on: the GPU, or without one the CPU, in Triton's interpreter.

    While the test runs torch.empty and its kin give tensors full of NaN: what a kernel does not write shows.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if not torch.cuda.is_available():
        mend_interpreter()
    on = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.use_deterministic_algorithms(on, warn_only=warn)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """Models this small gain nothing from threads, and lose much where other work shares the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with a data set of 200 random digits."""
    # Imports what reads data sets, which a machine that only runs the tests of kernels need not have.
    from tiny_runs import write_mnist

    return write_mnist(tmp_path_factory.mktemp("data"))


@pytest.fixture
def tiny_run(digits):
    """Makes a training of a few seconds: tiny_run(run_folder, setting=value, …)."""
    from tiny_runs import SETTINGS

    from adaclip.runs import RunFolder
    from adaclip.train import Training
    from adaclip.train_sources import resolve

    def make(path, **settings):
        config = resolve(SETTINGS | {"data_dir": str(digits)} | settings)
        return Training(config, RunFolder.create(path))

    return make
