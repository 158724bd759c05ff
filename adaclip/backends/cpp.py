"""The C++ core: float32 on the CPU, 16-bit gradients widened (which is exact), norms in float64.

The core reads raw memory. Names that look unused keep copies alive while it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaclip import _core, reference
from adaclip.backends import reference as plain
from adaclip.backends.values import ConvGeometry, Key, Method, Rounding, SampleNorms
from adaclip.reference import wide
from adaclip.step_rule import FusedStep, Move

__all__ = [
    "clip_factors",
    "conv_grad_rounding",
    "conv_keeps",
    "conv_sample_norms",
    "conv_sizes",
    "conv_weighted_grad",
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


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


# --- per-sample gradients ----------------------------------------------------------------------------


def _triple(values: Sequence[int], fill: int) -> tuple[int, int, int]:
    return (*[fill] * (3 - len(values)), *values)


def conv_sizes(x_shape: Sequence[int], g_shape: Sequence[int], geometry: ConvGeometry) -> tuple:
    """The size arguments of the core's convolution functions: 1-D and 2-D with leading ones."""
    kernel, stride, padding, dilation, groups = geometry
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


def conv_keeps(x: Tensor, out_channels: int, geometry: ConvGeometry) -> bool:
    g_shape = (x.shape[0], out_channels, *geometry.out(x.shape[2:]))
    return _core.conv_method(*conv_sizes(x.shape, g_shape, geometry))[1]


def conv_sample_norms(
    x: Tensor, g: Tensor, geometry: ConvGeometry, bias: bool, keep: bool | None
) -> SampleNorms:
    b, cin, cout = x.shape[0], x.shape[1], g.shape[1]
    x, g = wide(x).contiguous(), wide(g).contiguous()
    sizes = conv_sizes(x.shape, g.shape, geometry)
    method = _asked(Method(*_core.conv_method(*sizes)), keep)
    sqnorms, magnitudes = (x.new_empty(b, dtype=torch.float64) for _ in range(2))
    kept = x.new_empty(b, cout, cin // geometry.groups, *geometry.kernel) if method.keep else None
    rows = x.new_empty(b, cout) if bias else None
    _core.conv_sample_norms(
        x.data_ptr(),
        g.data_ptr(),
        *sizes,
        method.way,
        sqnorms.data_ptr(),
        magnitudes.data_ptr(),
        _at(kept),
        _at(rows),
        torch.get_num_threads(),
    )
    return SampleNorms(sqnorms, magnitudes, kept, rows)


def _asked(method: Method, keep: bool | None) -> Method:
    """The cost model's choice, under what the caller asks of it."""
    if keep:
        return Method("instantiate", True)
    return method if keep is None else Method(method.way, False)


def conv_weighted_grad(
    x: Tensor, g: Tensor, factors: Tensor, weight: Tensor, geometry: ConvGeometry
) -> Tensor:
    """Scales while it packs and skips products with padding; shapes that this does not suit go to torch."""
    x, g = wide(x), wide(g)
    sizes = conv_sizes(x.shape, g.shape, geometry)
    if not _core.conv_weighted_grad_suits(*sizes):
        return plain.conv_weighted_grad(x, g, factors, weight, geometry)
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


def conv_grad_rounding(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Rounding:
    return plain.conv_grad_rounding(x, g, geometry)


def linear_sample_norms(a: Tensor, g: Tensor, bias: bool, keep: bool | None) -> SampleNorms:
    (b, t, din), dout = a.shape, g.shape[2]
    a, g = wide(a).contiguous(), wide(g).contiguous()
    method = Method(*_core.linear_method(b, t, din, dout))
    if keep:
        method = Method("instantiate", True)
    sqnorms, magnitudes = (a.new_empty(b, dtype=torch.float64) for _ in range(2))
    kept = a.new_empty(b, dout, din) if method.keep else None
    rows = a.new_empty(b, dout) if bias else None
    _core.linear_sample_norms(
        a.data_ptr(),
        g.data_ptr(),
        b,
        t,
        din,
        dout,
        method.way,
        sqnorms.data_ptr(),
        magnitudes.data_ptr(),
        _at(kept),
        _at(rows),
        torch.get_num_threads(),
    )
    return SampleNorms(sqnorms, magnitudes, kept, rows)


def linear_weighted_grad(a: Tensor, g: Tensor, factors: Tensor) -> Tensor:
    return reference.linear_weighted_grad(a, g, factors)


def linear_grad_rounding(a: Tensor) -> Rounding:
    return plain.linear_grad_rounding(a)


def row_sqnorms(x: Tensor) -> Tensor:
    x = wide(x).contiguous()
    out = x.new_empty(x.shape[0], dtype=torch.float64)
    width = x[0].numel() if x.shape[0] else 0
    _core.row_sqnorms(x.data_ptr(), x.shape[0], width, out.data_ptr(), False, torch.get_num_threads())
    return out


def weighted_sum(x: Tensor, factors: Tensor) -> Tensor:
    x, factors = wide(x).contiguous(), factors.to(torch.float32).contiguous()
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
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    b, c = x.shape[:2]
    g, x, mean, rstd = (t.contiguous() for t in (g, x, mean, rstd))
    weight = None if weight is None else weight.contiguous()
    dx, dgamma, dbeta = torch.empty_like(x), x.new_empty(b, c), x.new_empty(b, c)
    _core.group_norm_backward(
        *(g.data_ptr(), x.data_ptr(), mean.data_ptr(), rstd.data_ptr(), _at(weight)),
        *(b, c, x[0, 0].numel(), groups),
        *(dx.data_ptr(), dgamma.data_ptr(), dbeta.data_ptr()),
        torch.get_num_threads(),
    )
    return dx, dgamma, dbeta


# --- norms to factors, statistics and thresholds ------------------------------------------------------


def clip_factors(
    sqnorms: Tensor,
    thresholds: Tensor,
    kind: str,
    stability: float,
    *,
    unit: float,
    denominator: float,
    real: int,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    groups, rows = sqnorms.shape
    sqnorms, thresholds = sqnorms.contiguous(), thresholds.contiguous()
    weights = None if weights is None else weights.contiguous()
    factors = sqnorms.new_empty(groups, rows, dtype=torch.float32)
    norms, shares = sqnorms.new_empty(rows), sqnorms.new_empty(rows)
    _core.clip_factors(
        *(sqnorms.data_ptr(), thresholds.data_ptr(), _at(weights)),
        *(groups, rows, real),
        *(kind, stability, reference.SLACK, unit, denominator),
        *(factors.data_ptr(), norms.data_ptr(), shares.data_ptr()),
    )
    return factors, norms, shares


def sample_statistics(
    sqnorms: Tensor,
    thresholds: Tensor,
    *,
    unit: float,
    real: int,
    shares: Tensor | None,
    below: Tensor | None,
    edges: Tensor | None,
    histogram: Tensor | None,
    labels: Tensor | None,
    table: Tensor | None,
    group_sums: Tensor | None,
    group_counts: Tensor | None,
) -> None:
    sqnorms, thresholds = sqnorms.contiguous(), thresholds.contiguous()
    edges, labels, table, shares = (
        None if t is None else t.contiguous() for t in (edges, labels, table, shares)
    )
    _core.sample_statistics(
        *(sqnorms.data_ptr(), thresholds.data_ptr(), *sqnorms.shape, real, unit),
        *(_at(below), _at(histogram), _at(edges), 0 if histogram is None else len(histogram)),
        *(_at(group_sums), _at(group_counts), _at(labels), _at(table), _at(shares)),
    )
    outputs = (below, histogram, group_sums, group_counts)
    torch.autograd.graph.increment_version([t for t in outputs if t is not None])


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
    noisy_below, low, high = (t.contiguous() for t in (noisy_below, low, high))
    _core.follow_quantile(
        *(t.data_ptr() for t in (thresholds, run, noisy_below, low, high)),
        *(len(thresholds), denominator, quantile, rate, accelerate),
    )
    torch.autograd.graph.increment_version([thresholds, run])


# --- noise --------------------------------------------------------------------------------------------


def normal_fill(
    key: Key, step: int, stream: int, out: Tensor, std: float, first_chunk: int, add: bool
) -> None:
    _core.normal_fill(
        *(key.host, step, stream, first_chunk, out.data_ptr(), out.numel(), std, add),
        torch.get_num_threads(),
    )


def noisy_sum(
    key: Key,
    step: int,
    stream: int,
    x: Tensor,
    factors: Tensor,
    first_chunk: int,
    std: float,
    denominator: float,
) -> Tensor:
    x, factors = x.contiguous(), factors.to(torch.float32).contiguous()
    out = x.new_empty(x.shape[1:])
    _core.noisy_sum(
        *(key.host, step, stream, x.data_ptr(), factors.data_ptr(), x.shape[0], out.numel()),
        *(out.data_ptr(), first_chunk, std, denominator, torch.get_num_threads()),
    )
    return out


def noisy_step(key: Key, step: int, stream: int, fused: FusedStep) -> None:
    rows = zip(fused.tensors, fused.first_chunks, fused.rules, strict=True)
    _core.noisy_step(
        *(key.host, step, stream),
        [(*map(_at, tensors), tensors[0].numel(), first, rule) for tensors, first, rule in rows],
        torch.get_num_threads(),
    )


def perturb(
    key: Key,
    step: int,
    stream: int,
    moves: Sequence[Move],
    draw: bool,
    sign: float,
    cache: dict[str, Any],
) -> None:
    _core.perturb(
        *(key.host, step, stream),
        [(*map(_at, m[:4]), m.param.numel(), m.first, m.std, m.length) for m in moves],
        *(draw, sign, torch.get_num_threads()),
    )
