"""Plain torch on any device and in any dtype: `adaclip.reference`, and the C++ core's noise moved to the device.

What fuses noise with something else (noisy_step, noisy_sum, perturb) is missing here: in its place the callers
make the noise first and do the rest in torch's operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaclip import _core, reference
from adaclip.backends.values import ConvGeometry, Key, Rounding, SampleNorms
from adaclip.reference import (
    clip_factors,
    follow_quantile,
    row_sqnorms,
    sample_statistics,
    weighted_sum,
    wide,
)

__all__ = [
    "clip_factors",
    "conv_grad_rounding",
    "conv_keeps",
    "conv_sample_norms",
    "conv_weighted_grad",
    "follow_quantile",
    "group_norm_backward",
    "linear_grad_rounding",
    "linear_sample_norms",
    "linear_weighted_grad",
    "normal_fill",
    "row_sqnorms",
    "sample_statistics",
    "weighted_sum",
]

# What core/conv_weighted_grad.h promises of its sums; other weight gradients are summed in float64.
_CONV_ROUNDINGS = 256 + 3


def conv_keeps(x: Tensor, out_channels: int, geometry: ConvGeometry) -> bool:
    return True


def conv_sample_norms(
    x: Tensor, g: Tensor, geometry: ConvGeometry, bias: bool, keep: bool | None
) -> SampleNorms:
    x, g = wide(x), wide(g)
    kernel, stride, padding, dilation, groups = geometry
    args = (list(kernel), list(stride), list(padding), list(dilation), groups)
    kept = reference.conv_sample_grads(x, g, *args)
    return SampleNorms(
        reference.row_sqnorms(kept),
        reference.position_norms_product(x.double(), g.double(), *args),
        None if keep is False else kept,
        g.flatten(2).sum(-1) if bias else None,
    )


def conv_weighted_grad(
    x: Tensor, g: Tensor, factors: Tensor, weight: Tensor, geometry: ConvGeometry
) -> Tensor:
    _, stride, padding, dilation, groups = geometry
    args = (list(stride), list(padding), list(dilation), groups)
    return reference.conv_weighted_grad(wide(x), wide(g), factors, weight.detach(), *args)


def conv_grad_rounding(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Rounding:
    return Rounding(_unit(x), _CONV_ROUNDINGS)


def linear_sample_norms(a: Tensor, g: Tensor, bias: bool, keep: bool | None) -> SampleNorms:
    a, g = wide(a), wide(g)
    rows = g.sum(1) if bias else None
    magnitudes = (a.double().norm(dim=2) * g.double().norm(dim=2)).sum(1).square()
    if a.shape[1] == 1 and not keep:
        return SampleNorms(magnitudes, magnitudes, None, rows)
    kept = reference.linear_sample_grads(a, g)
    return SampleNorms(reference.row_sqnorms(kept), magnitudes, kept, rows)


def linear_weighted_grad(a: Tensor, g: Tensor, factors: Tensor) -> Tensor:
    return reference.linear_weighted_grad(a, g, factors)


def linear_grad_rounding(a: Tensor) -> Rounding:
    return Rounding(_unit(a), reference.linear_roundings(a.shape[1]))


def _unit(x: Tensor) -> float:
    return torch.finfo(reference.wide_dtype(x.dtype)).eps / 2


def group_norm_backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    b, c = x.shape[:2]
    plane = x[0, 0].numel() if b and c else 0
    # torch's kernel reads all of them as if they were contiguous.
    g, x, mean, rstd = (t.contiguous() for t in (g, x, mean, rstd))
    weight = None if weight is None else weight.contiguous()
    dx = torch.ops.aten.native_group_norm_backward(
        g, x, mean, rstd, weight, b, c, plane, groups, [True, False, False]
    )[0]
    per_channel = [b, c, plane]
    centered = wide(x).reshape(b, groups, c // groups * plane) - mean.unsqueeze(-1)
    normalized = (centered * rstd.unsqueeze(-1)).reshape(per_channel)
    return dx, *reference.affine_sample_grads(normalized, wide(g).reshape(per_channel))


def normal_fill(
    key: Key, step: int, stream: int, out: Tensor, std: float | Tensor, first_chunk: int, add: bool
) -> None:
    noise = torch.empty(out.numel(), dtype=torch.float32, device="cpu")
    _core.normal_fill(
        *(key.host, step, stream, first_chunk, noise.data_ptr(), noise.numel(), 1.0, False),
        torch.get_num_threads(),
    )
    noise = noise.to(out.device) * std
    out.copy_(out + noise if add else noise)
