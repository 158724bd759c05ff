"""The one place where kernels are chosen: argument layout, dtypes and the backend table.

Per-sample arithmetic (`conv_sample_norms`, `linear_sample_norms`, `group_norm_backward`,
`row_sqnorms`, `weighted_sum`) has a "cpp" and a "reference" backend. "auto" takes the C++ core where
it can run the given dtype and device; a backend asked for by name that cannot raises and says why.
float16 and bfloat16 are widened to float32 first, which is exact, and stay so: results are in at least float32.

What is made of the norms (factors, statistics, thresholds) is in `adaclip.clip_ops` and named here too.
The differentiable layer operations that torch.compile sees are in `adaclip.layers.functions`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaclip import _core, reference
from adaclip.backends import BACKENDS, check_backend, resolve_backend
from adaclip.clip_ops import clip_factors, follow_quantile, sample_statistics
from adaclip.reference import wide

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "BACKENDS",
    "SampleNorms",
    "autocast_dtype",
    "check_backend",
    "clip_factors",
    "conv_keeps",
    "conv_sample_norms",
    "conv_weighted_grad",
    "follow_quantile",
    "group_norm_backward",
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


@dataclass
class SampleNorms:
    """What is known about one layer's per-sample weight gradients.

    sqnorms: float64 [B], squared norms of the weight gradient (exact up to float64 rounding for
      what the float32 inputs say).
    magnitudes: float64 [B], the scale rounding in the weighted gradient is proportional to
      (`reference.position_norms_product`).
    kept: [B, *weight.shape] per-sample weight gradients, when keeping them is cheaper than another
      convolution; then the sum is made from them.
    bias: [B, Cout] per-sample bias gradients, if asked for.
    """

    sqnorms: Tensor
    magnitudes: Tensor
    kept: Tensor | None
    bias: Tensor | None


def _triple(values: Sequence[int], fill: int) -> tuple[int, int, int]:
    return (*[fill] * (3 - len(values)), *values)


def _conv_sizes(x_shape, g_shape, kernel, stride, padding, dilation, groups) -> tuple:
    """The size arguments of the core's convolution functions: 1-D and 2-D with leading ones."""
    return (
        x_shape[0],
        x_shape[1],
        g_shape[1],
        _triple(x_shape[2:], 1),
        _triple(g_shape[2:], 1),
        _triple(kernel, 1),
        _triple(stride, 1),
        _triple(padding, 0),
        _triple(dilation, 1),
        groups,
    )


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
    if resolve_backend(backend, wide(x[:0])) == "reference":
        return True
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    g_shape = (x.shape[0], out_channels, *out)
    return _core.conv_method(*_conv_sizes(x.shape, g_shape, kernel, stride, padding, dilation, groups))[1]


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
    b, cin, cout = x.shape[0], x.shape[1], g.shape[1]
    x, g = wide(x), wide(g)
    if resolve_backend(backend, x, g) == "reference":
        args = (list(kernel), list(stride), list(padding), list(dilation), groups)
        kept = reference.conv_sample_grads(x, g, *args)
        return SampleNorms(
            reference.row_sqnorms(kept),
            reference.position_norms_product(x.double(), g.double(), *args),
            None if keep is False else kept,
            g.flatten(2).sum(-1) if bias else None,
        )
    x, g = x.contiguous(), g.contiguous()
    sizes = _conv_sizes(x.shape, g.shape, kernel, stride, padding, dilation, groups)
    method, worth_keeping = _core.conv_method(*sizes)
    if keep:
        method, worth_keeping = "instantiate", True
    elif keep is False:
        worth_keeping = False
    sqnorms, magnitudes = (x.new_empty(b, dtype=torch.float64) for _ in range(2))
    kept = x.new_empty(b, cout, cin // groups, *kernel) if worth_keeping else None
    rows = x.new_empty(b, cout) if bias else None
    _core.conv_sample_norms(
        x.data_ptr(),
        g.data_ptr(),
        *sizes,
        method,
        sqnorms.data_ptr(),
        magnitudes.data_ptr(),
        0 if kept is None else kept.data_ptr(),
        0 if rows is None else rows.data_ptr(),
        torch.get_num_threads(),
    )
    return SampleNorms(sqnorms, magnitudes, kept, rows)


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

    x, g as in `conv_sample_norms`; factors float32 [B]. The core scales while it packs and skips products
    with padding; shapes it does not suit (depthwise, few channels) take torch's weight gradient.
    """
    x, g = wide(x), wide(g)
    if resolve_backend(backend, x, g) == "cpp":
        sizes = _conv_sizes(x.shape, g.shape, kernel, stride, padding, dilation, groups)
        if _core.conv_weighted_grad_suits(*sizes):
            x, g, factors = x.contiguous(), g.contiguous(), factors.float().contiguous()
            out = x.new_empty(weight.shape)
            _core.conv_weighted_grad(
                x.data_ptr(),
                g.data_ptr(),
                factors.data_ptr(),
                *sizes,
                out.data_ptr(),
                torch.get_num_threads(),
            )
            return out
    geometry = (list(stride), list(padding), list(dilation), groups)
    return reference.conv_weighted_grad(x, g, factors, weight.detach(), *geometry)


@_as_written
def linear_sample_norms(
    a: Tensor, g: Tensor, *, bias: bool = False, keep: bool | None = None, backend: str = "auto"
) -> SampleNorms:
    """Per-sample squared norms of a linear layer's weight gradient.

    a: [B, T, Din], g: [B, T, Dout] (T = 1 for plain rows); kept is [B, Dout, Din].
    """
    (b, t, din), dout = a.shape, g.shape[2]
    a, g = wide(a), wide(g)
    if resolve_backend(backend, a, g) == "reference":
        rows = g.sum(1) if bias else None
        magnitudes = (a.double().norm(dim=2) * g.double().norm(dim=2)).sum(1).square()
        if t == 1 and not keep:
            return SampleNorms(magnitudes, magnitudes, None, rows)
        kept = reference.linear_sample_grads(a, g)
        return SampleNorms(reference.row_sqnorms(kept), magnitudes, kept, rows)
    a, g = a.contiguous(), g.contiguous()
    method, worth_keeping = _core.linear_method(b, t, din, dout)
    if keep:
        method, worth_keeping = "instantiate", True
    sqnorms, magnitudes = (a.new_empty(b, dtype=torch.float64) for _ in range(2))
    kept = a.new_empty(b, dout, din) if worth_keeping else None
    rows = a.new_empty(b, dout) if bias else None
    _core.linear_sample_norms(
        a.data_ptr(),
        g.data_ptr(),
        b,
        t,
        din,
        dout,
        method,
        sqnorms.data_ptr(),
        magnitudes.data_ptr(),
        0 if kept is None else kept.data_ptr(),
        0 if rows is None else rows.data_ptr(),
        torch.get_num_threads(),
    )
    return SampleNorms(sqnorms, magnitudes, kept, rows)


@_as_written
def linear_weighted_grad(a: Tensor, g: Tensor, factors: Tensor) -> Tensor:
    """`sum_b factors_b dL_b/dweight` [Dout, Din]: one matrix product. a, g as in `linear_sample_norms`."""
    return reference.linear_weighted_grad(a, g, factors)


def row_sqnorms(x: Tensor, *, backend: str = "auto") -> Tensor:
    """x [B, ...] -> float64 [B]: squared Euclidean norms, accumulated in float64."""
    x = wide(x)
    if resolve_backend(backend, x) == "reference":
        return reference.row_sqnorms(x)
    x = x.contiguous()
    out = x.new_empty(x.shape[0], dtype=torch.float64)
    width = x[0].numel() if x.shape[0] else 0
    _core.row_sqnorms(x.data_ptr(), x.shape[0], width, out.data_ptr(), False, torch.get_num_threads())
    return out


@_as_written
def weighted_sum(x: Tensor, factors: Tensor, *, backend: str = "auto") -> Tensor:
    """x [B, ...], factors [B] -> [...]: `sum_b factors_b x_b`; rows with factor 0 are not read."""
    x = wide(x)
    if resolve_backend(backend, x) == "reference":
        return reference.weighted_sum(x, factors)
    x, factors = x.contiguous(), factors.to(torch.float32).contiguous()
    out = x.new_empty(x.shape[1:])
    _core.weighted_sum(
        x.data_ptr(),
        factors.data_ptr(),
        x.shape[0],
        out.numel(),
        out.data_ptr(),
        False,
        torch.get_num_threads(),
    )
    return out


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
    b, c = x.shape[:2]
    plane = x[0, 0].numel() if b and c else 0
    affine = [] if weight is None else [weight]
    # The core reads raw memory, and torch's kernel ignores a weight's strides. The names keep the copies
    # alive while it is read.
    g, x, mean, rstd, *affine = (t.contiguous() for t in (g, x, mean, rstd, *affine))
    weight = affine[0] if affine else None
    if b and resolve_backend(backend, g, x, mean, rstd, *affine) == "cpp":
        dx, dgamma, dbeta = torch.empty_like(x), x.new_empty(b, c), x.new_empty(b, c)
        _core.group_norm_backward(
            g.data_ptr(),
            x.data_ptr(),
            mean.data_ptr(),
            rstd.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            b,
            c,
            plane,
            groups,
            dx.data_ptr(),
            dgamma.data_ptr(),
            dbeta.data_ptr(),
            torch.get_num_threads(),
        )
        return dx, dgamma, dbeta
    dx = torch.ops.aten.native_group_norm_backward(
        g, x, mean, rstd, weight, b, c, plane, groups, [True, False, False]
    )[0]
    per_channel = [b, c, plane]
    centered = wide(x).reshape(b, groups, c // groups * plane) - mean.unsqueeze(-1)
    normalized = (centered * rstd.unsqueeze(-1)).reshape(per_channel)
    return dx, *reference.affine_sample_grads(normalized, wide(g).reshape(per_channel))
