"""Kernels by themselves: each is checked against float64, then timed, and compared with the floor of its work."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adaclip.backends import ConvGeometry, choice, load, support
from adaclip.testing import relative_error
from adaclip.update import _fused_step
from bench import bench_noisy_step, tune_backends
from bench.gpu_parts.peaks import Peaks, Work, floor, peaks_of
from bench.gpu_parts.timing import kernel_time

__all__ = ["Bench", "copy_bandwidth"]

_SIZE = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


def copy_bandwidth(device: torch.device, toy: bool) -> float:
    """Bytes a second, read and written, that torch's copy moves."""
    n = 1 << (16 if toy else 28)
    source, target = (torch.empty(n, dtype=torch.float32, device=device) for _ in range(2))
    return 8 * n / kernel_time(lambda: target.copy_(source), device, 3 if toy else 20)


class Bench:
    """Measures kernels on one device, whose copy bandwidth is known. toy: sizes for the interpreter on a CPU."""

    def __init__(self, device: torch.device, bandwidth: float, rounds: int, toy: bool = False) -> None:
        self.device, self._bandwidth, self._rounds, self._toy = device, bandwidth, rounds, toy
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self._peaks: Peaks | None = peaks_of(name)
        self._rng = torch.Generator(device=device).manual_seed(0)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._rng, device=self.device)

    def _row(
        self, what: str, way: str, wrong: str | None, fn: Callable[[], Any], work: Work
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"what": what, "way": way}
        if wrong is not None:
            return row | {"status": "red", "why": wrong}
        seconds = kernel_time(fn, self.device, self._rounds)
        least, limit = floor(work, self._peaks, self._bandwidth)
        fraction = {"us": 1e6 * seconds, "floor_us": 1e6 * least, "fraction_of_floor": least / seconds}
        return row | {"status": "ok", **fraction, "limit": limit}

    # --- the noisy update

    def noisy_step(self) -> dict[str, Any]:
        """All parameters of a VGG-11 in one launch, by both backends, against the bytes of their tensors."""
        channels = [3, 4] if self._toy else bench_noisy_step.CHANNELS
        found = ["triton"] + (
            ["cuda"] if support.cuda_missing() is None and self.device.type == "cuda" else []
        )
        optimizers = {"SGD": 3, "SGD, momentum": 5, "Adam": 7}
        if self._toy:
            optimizers = {"SGD, momentum": 5}
        rows = []
        for name, passes in optimizers.items():
            for backend in found:
                case = bench_noisy_step.Case(name, channels, self.device, backend)
                try:
                    case.check()
                    wrong = None
                except AssertionError:
                    wrong = "its update is not torch's on the noisy gradient"
                n = sum(p.numel() for p in case.params)
                what = f"noisy step, {name}, {n:,} parameters"
                rows.append(
                    self._row(what, backend, wrong, self._update(case, backend), Work(4.0 * passes * n))
                )
        return _result(rows)

    def _update(self, case: bench_noisy_step.Case, backend: str) -> Callable[[], Any]:
        """The kernel alone: a replayed graph copies no numbers to the GPU, which takes longer than small kernels."""
        fused, _ = _fused_step(case.optimizer, case.params, [1e-2] * len(case.params))
        step = torch.full((1,), 7, dtype=torch.int64, device=self.device)

        def run() -> None:
            load(backend).noisy_step(case.source.key, step, 0, fused)

        if self.device.type != "cuda":
            return run
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return functools.partial(_replay, graph, case)

    # --- kept gradients and normalization

    def sums(self) -> dict[str, Any]:
        """What reads per-sample gradients, and the backward of a group norm."""
        triton = load("triton")
        rows, width = (5, 70) if self._toy else (256, 64 * 64 * 9)
        x, factors = self._randn(rows, width), self._randn(rows).abs()
        label = f"{rows} x {width:,} float32"
        truth = factors.double() @ x.double()
        error = relative_error(triton.weighted_sum(x, factors), truth)
        wrong = None if error <= 1e-5 else f"off by {error:.1e}"
        reads = Work(4.0 * x.numel())
        made = [
            self._row(
                f"weighted sum, {label}", "triton", wrong, lambda: triton.weighted_sum(x, factors), reads
            )
        ]
        exact = x.double().square().sum(1)
        above = triton.row_sqnorms(x) / exact - 1
        # The truth itself rounds.
        right = bool((above >= -1e-14).all()) and bool((above <= 2.0**-20).all())
        wrong = None if right else f"norms are {float(above.min()):.1e} to {float(above.max()):.1e} above"
        made.append(
            self._row(f"squared norms, {label}", "triton", wrong, lambda: triton.row_sqnorms(x), reads)
        )
        return _result([*made, self._group_norm(triton)])

    def _group_norm(self, triton: Any) -> dict[str, Any]:
        batch, channels, size, groups = (2, 4, 4, 2) if self._toy else (256, 64, 32, 16)
        x, g = (
            self._randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last)
            for _ in range(2)
        )
        weight = self._randn(channels)
        grouped = x.double().reshape(batch, groups, -1)
        mean, rstd = grouped.mean(2), (grouped.var(2, unbiased=False) + 1e-5).rsqrt()
        args = mean.float(), rstd.float(), weight, groups
        exact = load("reference").group_norm_backward(
            g.double(), x.double(), mean, rstd, weight.double(), groups
        )
        found = triton.group_norm_backward(g, x, *args)
        error = max(relative_error(a, b) for a, b in zip(found, exact, strict=True))
        wrong = None if error <= 1e-3 else f"off by {error:.1e}"
        what = f"group norm backward, {batch} x {channels} x {size}^2 float32"
        work = Work(3 * 4.0 * x.numel())
        return self._row(what, "triton", wrong, lambda: triton.group_norm_backward(g, x, *args), work)

    # --- convolutions

    def conv(self, layer: tuple[int, int, int], dtype: torch.dtype, batch: int) -> dict[str, Any]:
        """Every way of taking a layer's norms and weighted gradient; `chosen` is what the backends would take."""
        cin, cout, size = layer
        x, g = (
            self._randn(batch, c, size, size).to(dtype).contiguous(memory_format=torch.channels_last)
            for c in (cin, cout)
        )
        geometry = tune_backends.GEOMETRY
        method = choice.conv_method(self.device, (size, size), cin, cout, geometry, dtype)
        what = f"conv norms {cin}->{cout} @ {size}x{size}, {str(dtype).removeprefix('torch.')}, B = {batch}"
        factors = torch.rand(batch, device=self.device)
        sums = tune_backends.sums(x, g, factors)
        ways = tune_backends.ways(x, g, factors, sums["cudnn"])
        rows = []
        for name, (entry, norms, _) in ways.items():
            wrong = tune_backends.wrong(norms(), x, g)
            row = self._row(what, name, wrong, norms, conv_work(entry, layer, dtype, batch, geometry))
            rows.append(row | {"chosen": (entry["way"], entry["keep"]) == tuple(method)})
        chosen = choice.conv_sums(self.device, (size, size), cin, cout, geometry, dtype)
        for name, weigh in sums.items():
            wrong = tune_backends.wrong_sum(name, weigh(), x, g, factors)
            row = self._row(what.replace("norms", "sum"), name, wrong, weigh, sum_work(layer, dtype, batch))
            rows.append(row | {"chosen": name == chosen})
        return _result(rows)


def conv_work(
    entry: dict[str, Any], layer: tuple[int, int, int], dtype: torch.dtype, batch: int, geometry: ConvGeometry
) -> Work:
    """What a way of taking norms needs at least; Gram matrices: their symmetric halves. float32: three TF32 products."""
    cin, cout, size = layer
    positions, taps = size * size, math.prod(geometry.kernel)
    half = _SIZE[dtype] == 2
    times, kind = (1, "half") if half else (3, "tf32")
    read = _SIZE[dtype] * positions * (cin + cout)
    if entry["way"] == "gram":
        products, additions = positions**2 * (cin + cout), taps * positions**2 / 2
    else:
        products, additions = 2 * positions * taps * cin * cout, 0
    written = 4 * taps * cin * cout if entry["keep"] else 0
    return Work(batch * (read + written), batch * times * products, kind, batch * additions)


def sum_work(layer: tuple[int, int, int], dtype: torch.dtype, batch: int) -> Work:
    """What a weighted gradient needs at least: x and g read, and products of 16 bits where x has no more."""
    cin, cout, size = layer
    positions, taps = size * size, math.prod(tune_backends.GEOMETRY.kernel)
    moved = _SIZE[dtype] * batch * positions * (cin + cout) + 4 * taps * cin * cout
    kind = "half" if _SIZE[dtype] == 2 else "tf32"
    return Work(moved, 2.0 * batch * positions * taps * cin * cout, kind)


def _replay(graph: torch.cuda.CUDAGraph, case: object) -> None:
    """`case` is held: its tensors are what the graph writes."""
    graph.replay()


def _result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    wrong = [row["why"] for row in rows if row["status"] == "red"]
    return {"status": "red" if wrong else "ok", "rows": rows} | ({"why": wrong[0]} if wrong else {})
