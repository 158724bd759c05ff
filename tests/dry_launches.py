"""Launchers on a machine without a GPU: every launch is compiled for the capability given, and not run.

The interpreter takes arguments as Python has them; a launch turns them into types and constants first, and
compiles for those. `python dry_launches.py 90` prints how many kernels each launcher compiled.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from adaclip.kernels.clip_factors import clip_factors
from adaclip.kernels.conv_weighted_grad import conv_weighted_grad
from adaclip.kernels.follow_quantile import follow_quantile
from adaclip.kernels.group_norm import group_norm_backward
from adaclip.kernels.row_sqnorms import row_sqnorms
from adaclip.kernels.sample_statistics import sample_statistics
from adaclip.kernels.weighted_sum import weighted_sum

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Absent:
    """The part of a GPU driver that compilation asks."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def f64(*shape):
    return torch.ones(shape, dtype=torch.float64)


# Types and sizes do not meet: each dtype once with a usual size, float32 with all of them.
def with_shapes(usual, *others):
    return [(dtype, usual) for dtype in DTYPES] + [(torch.float32, shape) for shape in others]


def rows():
    for dtype, shape in with_shapes((16, 1024), (1, 1), (3, 7), (2, 20000)):
        row_sqnorms(torch.ones(shape, dtype=dtype))
        row_sqnorms(torch.ones(shape[0], shape[1] + 1, dtype=dtype)[:, :-1])


def sums():
    for dtype, shape in with_shapes((64, 1024), (1, 1), (3, 7), (200, 65)):
        weighted_sum(torch.ones(shape, dtype=dtype), torch.ones(shape[0]))


def factors():
    for kind, groups, count in (("threshold", 1, 1), ("normalized", 1, 16), ("psac", 3, 20)):
        for real in (0, 1, torch.tensor([count])):
            for weights in (None, f64(count)):
                numbers = {"slack": 1.0, "unit": 1, "denominator": 2.5, "real": real, "weights": weights}
                clip_factors(f64(groups, count), f64(groups), kind, 0.1, **numbers)


def statistics():
    # A number of samples that is known on the host, then one that is not.
    for groups, count, real in ((1, 1, 1), (1, 16, torch.tensor([1])), (3, 20, torch.tensor([1]))):
        labels, table = torch.zeros(count, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
        counts = {"labels": labels, "table": table, "group_counts": f64(1)}
        for wanted in (
            {"below": f64(groups)},
            {"edges": f64(0), "histogram": f64(1)},
            {"edges": f64(15), "histogram": f64(16), "below": f64(groups)},
            counts,
            {**counts, "group_sums": f64(1), "shares": f64(count), "below": f64(groups)},
        ):
            sample_statistics(f64(groups, count), f64(groups), unit=1, real=real, **wanted)


def quantiles():
    for groups in (1, 16, 70):
        for accelerate in (False, True):
            follow_quantile(*(f64(groups) for _ in range(5)), 10, 0.5, 0.2, accelerate)


def group_norms():
    others = ((1, 1, 1, 1), 1), ((2, 16, 4, 4), 16), ((2, 18, 3, 5), 6)
    for dtype, (shape, groups) in with_shapes(((2, 16, 4, 4), 1), *others):
        x, stats = torch.ones(shape, dtype=dtype), torch.ones(shape[0], groups)
        for form in (torch.contiguous_format, torch.channels_last):
            laid = x.contiguous(memory_format=form)
            for weight in (None, torch.ones(shape[1], dtype=dtype)):
                group_norm_backward(laid, laid, stats, stats.to(dtype), weight, groups)


def conv_sums():
    pair = {"stride": (1, 1), "dilation": (1, 1)}
    for dtype, batch, channels, size, kernel, groups in (
        (torch.bfloat16, 3, 16, 2, 3, 1),
        (torch.float16, 64, 32, 16, 3, 2),
        (torch.bfloat16, 1, 1, 9, 1, 1),
    ):
        x = torch.ones(batch, channels, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
        same = {"kernel": (kernel, kernel), "padding": (kernel // 2, kernel // 2), "groups": groups}
        conv_weighted_grad(x, x, torch.ones(batch), **same, **pair)


def main(capability):
    compiled = []
    triton.runtime.driver.set_active(Absent(capability))
    JITFunction.__getitem__ = lambda self, grid: (
        lambda *args, **kwargs: compiled.append(self.run(*args, grid=grid, warmup=True, **kwargs))
    )
    for launch in (rows, sums, factors, statistics, quantiles, group_norms, conv_sums):
        launch()
        assert compiled
        assert all(kernel.asm["cubin"] for kernel in compiled)
        print(launch.__name__, len({kernel.hash for kernel in compiled}), flush=True)
        compiled.clear()


if __name__ == "__main__":
    main(int(sys.argv[1]))
