"""The checked front of the operations: argument layout and dtypes; `adaclip.backends` says which kernel runs.

Per-sample arithmetic is here. "auto" takes, for tensors on a GPU, its kernels, for float32 and 16-bit tensors on the
CPU the C++ core, and plain torch for everything else; a backend asked for by name that cannot run raises and says
why. float16 and bfloat16 go into GPU kernels as they are and are widened to float32 elsewhere, which is exact:
results are in at least float32.

What is made of the norms (factors, statistics, thresholds) is in `adaclip.clip_ops` and named here too.
The differentiable layer operations that torch.compile sees are in `adaclip.layers.functions`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaclip import backends
from adaclip.backends import (
    BACKENDS,
    ConvGeometry,
    Rounding,
    SampleNorms,
    check_backend,
    implementation,
    resolve_backend,
)
from adaclip.backends.choice import conv_class, measured
from adaclip.backends.cudnn_grads import conv_output_unit
from adaclip.clip_ops import clip_factors, follow_quantile, sample_statistics
from adaclip.reference import wide

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "BACKENDS",
    "Rounding",
    "SampleNorms",
    "autocast_dtype",
    "check_backend",
    "clip_factors",
    "conv_grad_rounding",
    "conv_keeps",
    "conv_output_unit",
    "conv_sample_norms",
    "conv_weighted_grad",
    "follow_quantile",
    "group_norm_backward",
    "linear_grad_rounding",
    "linear_sample_norms",
    "linear_weighted_grad",
    "resolve_backend",
    "row_sqnorms",
    "sample_statistics",
    "weighted_sum",
]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of an active `torch.autocast` on that device; None without one."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _as_written(op: Callable) -> Callable:
    """`op` without autocast, for a backward that is called inside it.

    Factors and gradients rounded to 16 bits by a matrix product would contribute more than their bound.
    """

    @functools.wraps(op)
    def run(tensor: Tensor, *args, **kwargs):
        if autocast_dtype(tensor.device) is None:
            return op(tensor, *args, **kwargs)
        with torch.autocast(tensor.device.type, enabled=False):
            return op(tensor, *args, **kwargs)

    return run


def _alike(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype: kernels take no other pairs."""
    return (x, g) if x.dtype == g.dtype else (wide(x), wide(g))


def _backend_of_norms(backend: str, x: Tensor, out_channels: int, geometry: ConvGeometry) -> str:
    prefer = None
    if x.device.type == "cuda":
        entry = measured(x.device, conv_class(x.shape[2:], x.shape[1], out_channels, geometry, x.dtype))
        prefer = None if entry is None else entry.get("backend")
    return resolve_backend("conv_sample_norms", backend, x, planar=geometry.planar(), prefer=prefer)


def conv_keeps(
    x: Tensor,
    out_channels: int,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    backend: str = "auto",
) -> bool:
    """Whether `conv_sample_norms` with these arguments would keep the per-sample gradients."""
    geometry = ConvGeometry(kernel, stride, padding, dilation, groups)
    return backends.load(_backend_of_norms(backend, x, out_channels, geometry)).conv_keeps(
        x, out_channels, geometry
    )


@_as_written
def conv_sample_norms(
    x: Tensor,
    g: Tensor,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    bias: bool = False,
    keep: bool | None = None,
    backend: str = "auto",
) -> SampleNorms:
    """Per-sample squared norms of a convolution's weight gradient.

    x: [B, Cin, *in] input; g: [B, Cout, *out] gradient of each sample's own output; 1 to 3 spatial
    dimensions. `keep=True` asks for the per-sample gradients themselves, False for none of them, and
    None lets the cost model decide (shifted Gram, or instantiate and keep).
    """
    x, g = _alike(x, g)
    geometry = ConvGeometry(kernel, stride, padding, dilation, groups)
    run = backends.load(_backend_of_norms(backend, x, g.shape[1], geometry)).conv_sample_norms
    return run(x, g, geometry, bias, keep)


@_as_written
def conv_weighted_grad(
    x: Tensor,
    g: Tensor,
    factors: Tensor,
    weight: Tensor,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    """`sum_b factors_b dL_b/dweight`, shaped like weight; samples with factor 0 are not read.

    x, g as in `conv_sample_norms`; factors float32 [B]. How far it rounds says `conv_grad_rounding`.
    """
    x, g = _alike(x, g)
    run = implementation("conv_weighted_grad", backend, x, g)
    return run(x, g, factors, weight, ConvGeometry(kernel, stride, padding, dilation, groups))


def conv_grad_rounding(
    x: Tensor,
    g: Tensor,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    backend: str = "auto",
) -> Rounding:
    """How far `conv_weighted_grad` of these can round: the same for every number of samples."""
    x, g = _alike(x, g)
    run = backends.load(resolve_backend("conv_weighted_grad", backend, x, g)).conv_grad_rounding
    return run(x, g, ConvGeometry(kernel, stride, padding, dilation, groups))


@_as_written
def linear_sample_norms(
    a: Tensor, g: Tensor, *, bias: bool = False, keep: bool | None = None, backend: str = "auto"
) -> SampleNorms:
    """Per-sample squared norms of a linear layer's weight gradient.

    a: [B, T, Din], g: [B, T, Dout] (T = 1 for plain rows); kept is [B, Dout, Din].
    """
    a, g = _alike(a, g)
    return implementation("linear_sample_norms", backend, a, g)(a, g, bias, keep)


@_as_written
def linear_weighted_grad(a: Tensor, g: Tensor, factors: Tensor, *, backend: str = "auto") -> Tensor:
    """`sum_b factors_b dL_b/dweight` [Dout, Din]: one matrix product. a, g as in `linear_sample_norms`.

    How far it rounds says `linear_grad_rounding`.
    """
    a, g = _alike(a, g)
    return implementation("linear_weighted_grad", backend, a, g)(a, g, factors)


def linear_grad_rounding(a: Tensor, g: Tensor, backend: str = "auto") -> Rounding:
    """How far `linear_weighted_grad` of these can round."""
    a, g = _alike(a, g)
    return backends.load(resolve_backend("linear_weighted_grad", backend, a, g)).linear_grad_rounding(a)


def row_sqnorms(x: Tensor, *, backend: str = "auto") -> Tensor:
    """x [B, ...] -> float64 [B]: squared Euclidean norms, accumulated in float64; GPU kernels round them up."""
    return implementation("row_sqnorms", backend, x)(x)


@_as_written
def weighted_sum(x: Tensor, factors: Tensor, *, backend: str = "auto") -> Tensor:
    """x [B, ...], factors [B] -> [...]: `sum_b factors_b x_b`; rows with factor 0 are not read."""
    return implementation("weighted_sum", backend, x)(x, factors)


def group_norm_backward(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    groups: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of group normalization with per-sample affine gradients.

    g, x: [B, C, *]; mean, rstd: [B, groups] as saved by the forward; weight [C] or None.
    Returns the input gradient (like x), and the scale's and the shift's gradients, both [B, C] in at least
    float32.
    """
    if not x.numel():
        return backends.load("reference").group_norm_backward(g, x, mean, rstd, weight, groups)
    given = [t for t in (g, x, mean, rstd, weight) if t is not None]
    run = implementation("group_norm_backward", backend, *given)
    return run(g, x, mean, rstd, weight, groups)
