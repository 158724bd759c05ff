"""Kernels are launched with their tensors' GPU as the current one, which Triton takes whatever the tensors say."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from adaclip.backends import ConvGeometry, Key, current, load, support, triton_grads
from adaclip.step_rule import FusedStep, Move

SECOND = torch.device("cuda", 1)
KEY = Key(bytes(32))
PAIR = ConvGeometry([3, 3], [1, 1], [1, 1], [1, 1], 1)


def f32(*shape):
    return torch.ones(shape)


def f64(*shape):
    return torch.ones(shape, dtype=torch.float64)


# Every operation that has a kernel, with arguments that it launches one for.
CALLS = {
    "conv_sample_norms": lambda run: run(f32(2, 1, 4, 4), f32(2, 1, 4, 4), PAIR, False, False),
    "linear_sample_norms": lambda run: run(f32(2, 1, 4), f32(2, 1, 3), False, None),
    "group_norm_backward": lambda run: run(f32(2, 2, 3), f32(2, 2, 3), f32(2, 1), f32(2, 1), None, 1),
    "conv_weighted_grad": lambda run: run(
        f32(2, 1, 4, 4).bfloat16(), f32(2, 1, 4, 4).bfloat16(), f32(2), f32(1, 1, 3, 3), PAIR
    ),
    "row_sqnorms": lambda run: run(f32(2, 3)),
    "weighted_sum": lambda run: run(f32(2, 3), f32(2)),
    "clip_factors": lambda run: run(
        f64(1, 2), f64(1), "threshold", 0.0, unit=1.0, denominator=1.0, real=2, weights=None
    ),
    "sample_statistics": lambda run: run(
        *(f64(1, 2), f64(1)),
        **dict.fromkeys(("shares", "edges", "histogram", "labels", "table", "group_sums", "group_counts")),
        **{"unit": 1.0, "real": 2, "below": f64(1)},
    ),
    "follow_quantile": lambda run: run(*(f64(1) for _ in range(5)), 1.0, 0.5, 0.2, False),
    "normal_fill": lambda run: run(KEY, 1, 0, f32(4), 1.0, 0, False),
    "noisy_step": lambda run: run(KEY, 1, 0, FusedStep([(f32(4), None, None, None)], [0], [(1.0,) * 14])),
    "noisy_sum": lambda run: run(KEY, 1, 0, f32(2, 3), f32(2), 0, 1.0, 1.0),
    "perturb": lambda run: run(KEY, 1, 0, [Move(f32(4), f32(4), f32(4), None, 0, 1.0, 0.0)], True, 1.0, {}),
}


def test_a_gpu_is_the_current_one_meanwhile(monkeypatch):
    seen = []

    @contextmanager
    def device(place):
        seen.append(place)
        yield
        seen.append("back")

    monkeypatch.setattr(torch.cuda, "device", device)
    run = current.on_its_device(1)(lambda a, b, c=0: seen.append((a, c)))
    run("a", SimpleNamespace(device=SECOND), c=3)
    run("b", torch.ones(1))
    assert seen == [SECOND, ("a", 3), "back", ("b", 0)]


def test_every_operation_with_a_kernel_is_looked_at():
    assert CALLS.keys() == support.OPERATIONS.keys() - {"linear_weighted_grad"}


@pytest.mark.parametrize("operation", CALLS)
def test_every_launch_is_on_its_tensors_device(operation, monkeypatch):
    jit = pytest.importorskip("triton.runtime.jit", reason="triton is not installed")
    module, inside, launches = load("triton"), [], []

    @contextmanager
    def entered(device):
        inside.append(device)
        yield
        inside.pop()

    monkeypatch.setattr(current, "current", entered)
    monkeypatch.setattr(module, "current", entered)
    monkeypatch.setattr(
        jit.KernelInterface, "__getitem__", lambda self, grid: lambda *a, **k: launches.append(list(inside))
    )
    # Those that a library may make as well have their kernel beside.
    held = triton_grads if operation in support._LIBRARIES else module
    CALLS[operation](getattr(held, operation))
    assert launches
    assert all(places == [torch.device("cpu")] for places in launches)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_second_gpu_gets_its_kernels(backend):
    from noise_cases import KEY as SAME

    from adaclip.noise import NoiseSource
    from adaclip.update import noisy_update

    why = support.REASONS[backend]("noisy_step", [torch.ones(1, device=SECOND)], True)
    if why is not None:
        pytest.skip(why)
    ends = []
    with torch.cuda.device(0):
        for device in (torch.device("cpu"), SECOND):
            p = torch.nn.Parameter(torch.ones(1000, device=device))
            p.grad = torch.ones_like(p)
            chosen = "cpp" if device.type == "cpu" else backend
            noisy_update(torch.optim.SGD([p], lr=0.1), [p], [0.5], NoiseSource(SAME), 3, backend=chosen)
            ends.append(p.detach().cpu())
        assert torch.cuda.current_device() == 0
    assert torch.equal(*ends)
