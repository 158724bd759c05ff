"""The Triton kernels of `adaclip.kernels`, imported when they are first called.

Weight gradients are cuDNN's and cuBLAS's, but for 16-bit convolutions of shapes that a kernel was chosen for. Tensors
are on a CUDA GPU; in Triton's interpreter they are on the CPU, and what would be cuDNN's and cuBLAS's is the C++ core's.
Gradients go in as they are: bfloat16, float16 or float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaclip import reference
from adaclip.backends import choice, cpp, cudnn_grads, support, triton_grads
from adaclip.backends.current import current, on_its_device
from adaclip.backends.planes import as_planes
from adaclip.backends.values import ConvGeometry, Key, Method, Rounding, SampleNorms
from adaclip.layout import is_flat
from adaclip.step_rule import FusedStep, Move

__all__ = [
    "clip_factors",
    "conv_grad_rounding",
    "conv_keeps",
    "conv_method",
    "conv_norms",
    "conv_sample_norms",
    "conv_weighted_grad",
    "counter",
    "follow_quantile",
    "group_norm_backward",
    "linear_grad_rounding",
    "linear_sample_norms",
    "linear_weighted_grad",
    "noisy_step",
    "noisy_sum",
    "normal_fill",
    "perturb",
    "row_sqnorms",
    "sample_statistics",
    "weighted_sum",
]


# --- per-sample gradients ----------------------------------------------------------------------------


def conv_keeps(x: Tensor, out_channels: int, geometry: ConvGeometry) -> bool:
    return choice.conv_method(x.device, x.shape[2:], x.shape[1], out_channels, geometry, x.dtype).keep


@on_its_device()
def conv_sample_norms(
    x: Tensor, g: Tensor, geometry: ConvGeometry, bias: bool, keep: bool | None
) -> SampleNorms:
    from adaclip.kernels.conv_sample_norms import conv_sample_norms

    return conv_norms(conv_sample_norms, x, g, geometry, bias, conv_method(x, g, geometry, keep))


def conv_method(x: Tensor, g: Tensor, geometry: ConvGeometry, keep: bool | None) -> Method:
    """How the norms are taken: the choice, under what the caller asks of it."""
    if keep:
        return Method("instantiate", True)
    method = choice.conv_method(x.device, x.shape[2:], x.shape[1], g.shape[1], geometry, x.dtype)
    return method if keep is None else Method(method.way, False)


def conv_norms(
    gram: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    g: Tensor,
    geometry: ConvGeometry,
    bias: bool,
    method: Method,
) -> SampleNorms:
    """Norms by a method, where `gram` is the kernel of the shifted Gram."""
    shape = (x.shape[0], g.shape[1], x.shape[1] // geometry.groups, *geometry.kernel)
    x, g, geometry = as_planes(x, g, geometry)
    if method.keep:
        from adaclip.kernels.conv_sample_grads import conv_sample_grads

        sqnorms, kept, rows = conv_sample_grads(x, g, **geometry._asdict(), keep=True, bias=bias)
        return SampleNorms(sqnorms, None, kept.reshape(shape), rows)
    if method.way == "instantiate":
        from adaclip.kernels.conv_sample_grads import instantiated_norms as gram
    sqnorms, magnitudes = gram(x, g, **geometry._asdict())
    rows = g.sum((2, 3), dtype=torch.float32) if bias else None
    return SampleNorms(sqnorms, magnitudes, None, rows)


def conv_weighted_grad(
    x: Tensor, g: Tensor, factors: Tensor, weight: Tensor, geometry: ConvGeometry
) -> Tensor:
    return _conv_sums(x, g, geometry).conv_weighted_grad(x, g, factors, weight, geometry)


def conv_grad_rounding(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Rounding:
    return _conv_sums(x, g, geometry).conv_grad_rounding(x, g, geometry)


def _conv_sums(x: Tensor, g: Tensor, geometry: ConvGeometry):
    sums = choice.conv_sums(x.device, x.shape[2:], x.shape[1], g.shape[1], geometry, x.dtype)
    return triton_grads if sums == "triton" and support.triton_missing() is None else _products(x)


@on_its_device()
def linear_sample_norms(a: Tensor, g: Tensor, bias: bool, keep: bool | None) -> SampleNorms:
    from adaclip.kernels import linear_sample_norms as kernels

    a, g = a.contiguous(), g.contiguous()
    rows = g.sum(1, dtype=torch.float32) if bias else None
    if keep or choice.linear_method(a.device, *a.shape[1:], g.shape[2], a.dtype).keep:
        sqnorms, kept = kernels.linear_sample_grads(a, g, True)
        return SampleNorms(sqnorms, None, kept, rows)
    # The kernel's own choice between Gram matrices and the gradient itself.
    return SampleNorms(*kernels.linear_sample_norms(a, g), None, rows)


def linear_weighted_grad(a: Tensor, g: Tensor, factors: Tensor) -> Tensor:
    return _products(a).linear_weighted_grad(a, g, factors)


def linear_grad_rounding(a: Tensor) -> Rounding:
    return _products(a).linear_grad_rounding(a)


def _products(x: Tensor):
    return cudnn_grads if x.device.type == "cuda" else cpp


def _rows(x: Tensor) -> Tensor:
    """[B, ...] -> [B, n], contiguous."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:])).contiguous()


@on_its_device()
def row_sqnorms(x: Tensor) -> Tensor:
    from adaclip.kernels.row_sqnorms import row_sqnorms

    return row_sqnorms(_rows(x))


@on_its_device()
def weighted_sum(x: Tensor, factors: Tensor) -> Tensor:
    from adaclip.kernels.weighted_sum import weighted_sum

    factors = factors.to(torch.float32).contiguous()
    if not x.is_contiguous() and x.shape[0] and is_flat(x[0]):
        # Per-sample gradients in another order of dimensions: summed where they lie.
        rows = x.as_strided((x.shape[0], x[0].numel()), (x.stride(0), 1))
        return weighted_sum(rows, factors).as_strided(x.shape[1:], x.stride()[1:])
    return weighted_sum(_rows(x), factors).view(x.shape[1:])


@on_its_device()
def group_norm_backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    from adaclip.kernels.group_norm import group_norm_backward

    weight = None if weight is None else weight.contiguous()
    return group_norm_backward(g, x, mean.contiguous(), rstd.contiguous(), weight, groups)


# --- norms to factors, statistics and thresholds ------------------------------------------------------


@on_its_device()
def clip_factors(
    sqnorms: Tensor,
    thresholds: Tensor,
    kind: str,
    stability: float,
    *,
    unit: float,
    denominator: float,
    real: int | Tensor,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from adaclip.kernels.clip_factors import clip_factors

    return clip_factors(
        sqnorms.contiguous(),
        thresholds.contiguous(),
        kind,
        stability,
        slack=reference.SLACK,
        unit=unit,
        denominator=denominator,
        real=real,
        weights=None if weights is None else weights.contiguous(),
    )


@on_its_device()
def sample_statistics(sqnorms: Tensor, thresholds: Tensor, **arguments: Any) -> None:
    from adaclip.kernels.sample_statistics import sample_statistics

    inputs = ("shares", "edges", "labels", "table")
    dense = {k: arguments[k].contiguous() for k in inputs if arguments[k] is not None}
    sample_statistics(sqnorms.contiguous(), thresholds.contiguous(), **(arguments | dense))
    outputs = (arguments[k] for k in ("below", "histogram", "group_sums", "group_counts"))
    torch.autograd.graph.increment_version([t for t in outputs if t is not None])


@on_its_device()
def follow_quantile(
    thresholds: Tensor,
    run: Tensor,
    noisy_below: Tensor,
    low: Tensor,
    high: Tensor,
    denominator: float,
    quantile: float,
    rate: float,
    accelerate: bool,
) -> None:
    from adaclip.kernels.follow_quantile import follow_quantile

    inputs = (t.contiguous() for t in (noisy_below, low, high))
    follow_quantile(thresholds, run, *inputs, denominator, quantile, rate, accelerate)
    torch.autograd.graph.increment_version([thresholds, run])


# --- noise --------------------------------------------------------------------------------------------


def counter(step: int | Tensor, device: torch.device) -> Tensor:
    """int64 [1] on the device: the step's number, whose bits a kernel reads as unsigned.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the number is not in device memory: every replay would
          draw the same noise.
    """
    if isinstance(step, Tensor):
        return step
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "step must be an int64 tensor [1] on the device while a CUDA graph is captured: with a number, all "
            "replays of the graph would release the same noise"
        )
    return torch.full((1,), step - (1 << 64) if step >= 1 << 63 else step, dtype=torch.int64, device=device)


def _one(std: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(std, Tensor):
        return std.to(torch.float32).reshape(1)
    return torch.full((1,), std, dtype=torch.float32, device=device)


@on_its_device(3)
def normal_fill(
    key: Key,
    step: int | Tensor,
    stream: int,
    out: Tensor,
    std: float | Tensor,
    first_chunk: int,
    add: bool,
) -> None:
    from adaclip.kernels.normal_fill import normal_fill

    device = out.device
    normal_fill(key.on(device), counter(step, device), stream, out, _one(std, device), first_chunk, add)


@on_its_device(3)
def noisy_sum(
    key: Key,
    step: int | Tensor,
    stream: int,
    x: Tensor,
    factors: Tensor,
    first_chunk: int,
    std: float,
    denominator: float,
) -> Tensor:
    from adaclip.kernels.clip_and_noise import noisy_sum

    device = x.device
    out = torch.empty(math.prod(x.shape[1:]), dtype=torch.float32, device=device)
    where = key.on(device), counter(step, device), stream
    factors = factors.to(torch.float32).contiguous()
    noisy_sum(*where, _rows(x), factors, out, first_chunk, _one(std, device), denominator)
    return out.view(x.shape[1:])


def noisy_step(key: Key, step: int | Tensor, stream: int, fused: FusedStep) -> None:
    from adaclip.backends.device_table import step_table
    from adaclip.kernels.noisy_step import noisy_step

    if not fused.tensors:
        return
    device = fused.tensors[0][0].device
    with current(device):
        noisy_step(key.on(device), counter(step, device), stream, step_table(fused))


def perturb(
    key: Key,
    step: int | Tensor,
    stream: int,
    moves: Sequence[Move],
    draw: bool,
    sign: float,
    cache: dict[str, Any],
) -> None:
    from adaclip.backends.device_table import moves_table
    from adaclip.kernels.perturb import perturb

    device = moves[0].param.device
    with current(device):
        perturb(key.on(device), counter(step, device), stream, moves_table(moves, cache), draw, sign)
