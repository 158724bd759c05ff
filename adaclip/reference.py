"""Every operation in plain torch, beside its formula.

The tests run these in float64 as the truth; the "reference" backend runs them where no kernel does
(other dtypes and devices). 16-bit gradients are widened to float32 before anything is multiplied or
summed: a factor rounded to 8 bits would let a sample contribute more than its bound. Index letters: b sample, t output position, d unfolded input position
(channel and kernel offset), o output channel, k kernel offset.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "SLACK",
    "affine_sample_grads",
    "clip_factors",
    "conv_sample_grads",
    "conv_weighted_grad",
    "embedding_sample_grads",
    "embedding_weighted_grad",
    "follow_quantile",
    "linear_roundings",
    "linear_sample_grads",
    "linear_weighted_grad",
    "live_rows",
    "position_norms_product",
    "row_sqnorms",
    "scale_rows",
    "weighted_sum",
    "wide",
    "wide_dtype",
    "windows",
]


# Positions that one matrix product sums in float32; further ones are added in float64. A constant and not the
# batch's size: how much a sum can round decides norms, and one sample's norm may not depend on how many
# others there are.
_LONGEST_SUM = 1024


def linear_roundings(positions: int) -> int:
    """How many roundings in a row an entry of `linear_weighted_grad` can pass through.

    positions: those of one sample; the number of samples does not matter.
    """
    return max(positions, _LONGEST_SUM) + 3


# Products and float32 roundings of the weighted sum stay inside this margin, so that
# |c_b g_b| <= C (1 + 2^-20) holds for the arithmetic that is done, not just for the formula.
SLACK = 1 - 2.0**-21


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values of `dtype` are scaled and summed in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def wide(t: Tensor) -> Tensor:
    """t in at least float32; exact."""
    return t.to(wide_dtype(t.dtype))


def windows(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """The receptive fields of a convolution: [B, C, *in] -> [B, C, *out, *kernel], a view of padded x."""
    n = len(kernel)
    pads = [p for side in reversed(padding) for p in (side, side)]
    x = F.pad(x, pads)
    out = [(x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(n)]
    steps = x.stride()
    return x.as_strided(
        [*x.shape[:2], *out, *kernel],
        [
            *steps[:2],
            *(steps[2 + i] * stride[i] for i in range(n)),
            *(steps[2 + i] * dilation[i] for i in range(n)),
        ],
    )


def conv_sample_grads(
    x: Tensor,
    g: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Per-sample weight gradients of a convolution, `P[b,o,d] = sum_t g[b,o,t] * x[b, pos(t,d)]`.

    x [B, Cin, *in], g [B, Cout, *out] -> [B, Cout, Cin/groups, *kernel].
    """
    b, cin, cout = x.shape[0], x.shape[1], g.shape[1]
    fields = windows(x, kernel, stride, padding, dilation)
    # An input larger than the last stride reaches leaves positions nobody looked at.
    fields = fields[(slice(None), slice(None), *(slice(0, s) for s in g.shape[2:]))]
    # Sizes in full: -1 has no meaning where the batch is empty.
    positions, window = math.prod(g.shape[2:]), math.prod(kernel)
    fields = fields.reshape(b, groups, cin // groups, positions, window)
    grads = g.reshape(b, groups, cout // groups, positions)
    return torch.einsum("bgot,bgctk->bgock", grads, fields).reshape(b, cout, cin // groups, *kernel)


def position_norms_product(
    x: Tensor,
    g: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """`M[b] = sum_k (sum_t |g_t| |x_pos(t,k)|)^2`: what rounding in the weight gradient scales with.

    |.| is the Euclidean norm over the channels of one group. By Cauchy-Schwarz M bounds the squared
    norm of the gradient computed from absolute values, which is what floating-point error is
    proportional to, and it is M, not the gradient's norm, that stays large when positions cancel.
    """
    b, cin, cout = x.shape[0], x.shape[1], g.shape[1]
    xn = x.reshape(b, groups, cin // groups, *x.shape[2:]).norm(dim=2)
    gn = g.reshape(b, groups, cout // groups, *g.shape[2:]).norm(dim=2)
    fields = windows(xn, kernel, stride, padding, dilation)
    fields = fields[(slice(None), slice(None), *(slice(0, s) for s in g.shape[2:]))]
    fields = fields.reshape(b, groups, math.prod(g.shape[2:]), math.prod(kernel))
    return torch.einsum("bgt,bgtk->bgk", gn.flatten(2), fields).square().sum((1, 2))


def linear_sample_grads(a: Tensor, g: Tensor) -> Tensor:
    """a [B, T, Din], g [B, T, Dout] -> [B, Dout, Din]: `sum_t g_t a_t^T`."""
    return torch.einsum("bto,bti->boi", g, a)


def embedding_sample_grads(indices: Tensor, g: Tensor, rows: int, padding_idx: int | None) -> Tensor:
    """indices [B, T] int64, g [B, T, E] -> [B, rows, E]; gradients at padding_idx are dropped."""
    b, _, width = g.shape
    if padding_idx is not None:
        g = g.masked_fill((indices == padding_idx).unsqueeze(-1), 0)
    out = g.new_zeros(b, rows, width)
    return out.scatter_add_(1, indices.unsqueeze(-1).expand_as(g), g)


def linear_weighted_grad(a: Tensor, g: Tensor, factors: Tensor) -> Tensor:
    """a [B, T, Din], g [B, T, Dout], factors [B] -> [Dout, Din]: `sum_b factors_b sum_t g_t a_t^T`."""
    factors, a, g = live_rows(factors, a, g)
    a, g = scale_rows(factors, a, g)
    size = max(1, _LONGEST_SUM // max(1, a.shape[1]))
    pieces = zip(a.split(size), g.split(size), strict=True)
    products = (h.flatten(0, 1).t() @ x.flatten(0, 1) for x, h in pieces)
    total = next(products)
    for product in products:
        total = total.double() + product
    return total.to(g.dtype)


def embedding_weighted_grad(indices: Tensor, g: Tensor, factors: Tensor, rows: int) -> Tensor:
    """indices [B, T] int64, g [B, T, E], factors [B] -> [rows, E]: the factors times `embedding_sample_grads`."""
    factors, indices, g = live_rows(factors, indices, g)
    # In float64: any number of samples may name the same row, and that number is private.
    scaled = (g.double() * factors.double().reshape(-1, 1, 1)).flatten(0, 1)
    total = scaled.new_zeros(rows, g.shape[-1]).index_add_(0, indices.flatten(), scaled)
    return total.to(wide_dtype(g.dtype))


def affine_sample_grads(normalized: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """normalized, g [B, C, T] -> per-sample gradients of scale and shift, both [B, C]."""
    return (normalized * g).sum(-1), g.sum(-1)


def row_sqnorms(x: Tensor) -> Tensor:
    """x [B, ...] -> float64 [B], the squared Euclidean norm of each row."""
    return (
        x.reshape(x.shape[0], -1).double().square().sum(1)
        if x.numel()
        else x.new_zeros(x.shape[0], dtype=torch.float64)
    )


def weighted_sum(x: Tensor, factors: Tensor) -> Tensor:
    """x [B, ...], factors [B] -> [...]: `sum_b factors_b x_b`; rows with factor 0 do not enter at all.

    The sum is in at least float32, whatever x is in.
    """
    keep = (factors != 0).reshape(-1, *[1] * (x.dim() - 1))
    x = wide(x)
    x = torch.where(keep, x, x.new_zeros(()))
    return torch.tensordot(factors.to(x.dtype), x, dims=1)


def live_rows(factors: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """(factors, *tensors) without the rows whose factor is 0.

    Leaving such a row in, multiplied by 0, would let one non-finite sample turn the sum into nan.
    """
    live = factors != 0
    if factors.device.type != "cpu":
        # No host round trip on an accelerator: zero the rows instead of dropping them.
        return factors, *(
            torch.where(live.reshape(-1, *[1] * (t.dim() - 1)), t, t.new_zeros(())) for t in tensors
        )
    if bool(live.all()):
        return factors, *tensors
    rows = live.nonzero().squeeze(1)
    return factors[rows], *(t[rows] for t in tensors)


def scale_rows(factors: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """x and g, widened, with the smaller of the two multiplied by the factors, row by row."""
    x, g = wide(x), wide(g)

    def scaled(t: Tensor) -> Tensor:
        return t * factors.to(t.dtype).reshape(-1, *[1] * (t.dim() - 1))

    return (scaled(x), g) if x.numel() < g.numel() else (x, scaled(g))


def conv_weighted_grad(
    x: Tensor,
    g: Tensor,
    factors: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """`sum_b factors_b dL_b/dweight`, shaped like weight: one weight gradient of the scaled tensors."""
    factors, x, g = live_rows(factors, x, g)
    x, g = scale_rows(factors, x, g)
    if g.shape[0] == 0:
        return torch.zeros_like(weight, dtype=g.dtype)
    # In float64: in float32, how far the sum rounds would depend on how many samples there are.
    total = torch.ops.aten.convolution_backward(
        g.double(),
        x.double(),
        weight.double(),
        None,
        stride,
        padding,
        dilation,
        False,
        [0] * len(stride),
        groups,
        [False, True, False],
    )[1]
    return total.to(g.dtype)


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
    """sqnorms [K, B] -> (factors float32 [K, B], norms [B], shares [B]): see `adaclip.clip_ops.clip_factors`."""
    n = unit * sqnorms.sqrt()
    limits = thresholds[:, None] * SLACK
    if kind == "threshold":
        full = (limits / n).clamp_max(1.0)
    else:
        full = limits / (n + (stability if kind == "normalized" else stability / (n + stability)))
    live = _live(sqnorms, real)
    shares = ((full * n).square().sum(0) / thresholds.square().sum()).sqrt().clamp_max(1.0)
    c = full
    if weights is not None:
        w = weights.nan_to_num(0.0).clamp(0.0, 1.0)
        c = torch.minimum(w, full) if kind == "threshold" else w * full
    factors = (c * unit / denominator).float()
    # A denormal factor has lost the digits that made it safe.
    factors = torch.where(live & (factors >= 2.0**-100), factors, torch.zeros_like(factors))
    return factors, unit * sqnorms.sum(0).sqrt(), torch.where(live, shares, shares.new_full((), math.nan))


def sample_statistics(
    sqnorms: Tensor,
    thresholds: Tensor,
    *,
    unit: float,
    real: int | Tensor,
    shares: Tensor | None,
    below: Tensor | None,
    edges: Tensor | None,
    histogram: Tensor | None,
    labels: Tensor | None,
    table: Tensor | None,
    group_sums: Tensor | None,
    group_counts: Tensor | None,
) -> None:
    """Adds the samples' counts to below [K], histogram [M], group_sums [G], group_counts [G], in place.

    See `adaclip.clip_ops.sample_statistics`. Sums over masks [bins, B], not scatters: their order is fixed.
    """
    live = _live(sqnorms, real)
    zero = sqnorms.new_zeros(())
    if below is not None:
        inside = (unit * sqnorms.sqrt() <= thresholds[:, None]).double() - 0.5
        below += torch.where(live, inside, zero).sum(1)
    if histogram is not None:
        bins = torch.searchsorted(edges, torch.where(live, unit * sqnorms.sum(0).sqrt(), zero))
        histogram += (_members(bins, len(histogram)) & live).sum(1)
    if labels is not None:
        known = live & (labels >= 0) & (labels < len(table))
        group = table[torch.where(known, labels, torch.zeros_like(labels))]
        if group_sums is not None:
            of = _members(group, len(group_sums)) & known
            group_sums += torch.where(of, shares, zero).sum(1)
        if group_counts is not None:
            group_counts += (_members(group, len(group_counts)) & known).sum(1)


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
    """`C *= exp(-rate f (1/2 + noisy_below / denominator - quantile))` in place: see `adaclip.clip_ops`."""
    gap = 0.5 + noisy_below / denominator - quantile
    speed = torch.ones_like(gap)
    if accelerate:
        side = (gap > 0.75 * (1 - quantile)).double() - (gap < -0.75 * quantile).double()
        run.copy_(torch.where(side * run > 0, run + side, side))
        speed = (run.abs() - 2.0).clamp(0.0, 3.0).exp2()
    moved = thresholds * (-rate * speed * gap).exp()
    thresholds.copy_(torch.minimum(torch.maximum(moved, low), high))


def _live(sqnorms: Tensor, real: int | Tensor) -> Tensor:
    """bool [B]: the rows of samples whose squared norms are numbers in [0, inf) in every group."""
    rows = torch.arange(sqnorms.shape[1], device=sqnorms.device)
    return (sqnorms.isfinite() & (sqnorms >= 0)).all(0) & (rows < real)


def _members(group: Tensor, groups: int) -> Tensor:
    """int64 [B] -> bool [groups, B]."""
    return group == torch.arange(groups, device=group.device)[:, None]
