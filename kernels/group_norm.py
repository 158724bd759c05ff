"""Group normalization: the backward, with affine gradients for every sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaclip.kernels.aot import Variant

__all__ = ["group_norm_backward"]

_TILE = 2048  # values of g and of x in registers at a time
_STEPS = 16  # tiles that are summed in float32 before their sums go to float64
_PACKED = 64  # channels, at most, of a program that takes several groups


@triton.jit
def _group_norm_backward(
    g,
    x,
    mean,
    rstd,
    weight,
    dx,
    dgamma,
    dbeta,
    channels,
    plane,
    groups,
    members,
    g_row,
    g_channel,
    g_position,
    x_row,
    x_channel,
    x_position,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Both passes over GROUPS whole groups of one sample, so that the second finds g and x in cache.

    members: channels of a group, GROUPS * members <= CHANNELS. dx has the strides of x.
    """
    programs = (groups + GROUPS - 1) // GROUPS
    b = tl.program_id(0).to(tl.int64) // programs
    first_group = (tl.program_id(0) % programs) * GROUPS
    lane = tl.arange(0, CHANNELS)
    channel = first_group * members + lane
    mine = (lane < GROUPS * members) & (channel < channels)
    group = b * groups + channel // members
    center = tl.load(mean + group, mask=mine, other=0.0).to(tl.float32)
    scale = tl.load(rstd + group, mask=mine, other=0.0).to(tl.float32)
    g_at = g + b * g_row + channel.to(tl.int64)[:, None] * g_channel
    x_at = x + b * x_row + channel.to(tl.int64)[:, None] * x_channel
    lanes = tl.arange(0, POSITIONS)

    with_x = tl.zeros([CHANNELS], tl.float64)
    plain = tl.zeros([CHANNELS], tl.float64)
    for first in range(0, plane, POSITIONS * STEPS):
        products = tl.zeros([CHANNELS, POSITIONS], tl.float32)
        plains = tl.zeros([CHANNELS, POSITIONS], tl.float32)
        for start in range(first, tl.minimum(plane, first + POSITIONS * STEPS), POSITIONS):
            t = start + lanes
            mask = mine[:, None] & (t < plane)[None, :]
            grad = tl.load(g_at + t.to(tl.int64)[None, :] * g_position, mask=mask, other=0.0).to(tl.float32)
            value = tl.load(x_at + t.to(tl.int64)[None, :] * x_position, mask=mask, other=0.0).to(tl.float32)
            products += grad * (value - center[:, None])
            plains += grad
        with_x += tl.sum(products, 1).to(tl.float64)
        plain += tl.sum(plains, 1).to(tl.float64)

    at = b * channels + channel
    tl.store(dgamma + at, with_x * scale, mask=mine)
    tl.store(dbeta + at, plain, mask=mine)
    gain = scale
    if weight is not None:
        w = tl.load(weight + channel, mask=mine, other=0.0).to(tl.float32)
        gain = scale * w
        with_x *= w
        plain *= w
    count = tl.cast(members, tl.float64) * plane
    if GROUPS == 1:
        shift = (tl.sum(plain, 0) / count * -scale).to(tl.float32)
        slope = (tl.sum(with_x, 0) / count * -scale * scale * scale).to(tl.float32)
    else:
        # A lane's row picks the lanes of its own group. Selected and not multiplied by 0: another group's inf
        # is none of this one's business.
        same = (lane // members)[:, None] == (lane // members)[None, :]
        shift = (tl.sum(tl.where(same, plain[None, :], 0.0), 1) / count * -scale).to(tl.float32)
        slope = (tl.sum(tl.where(same, with_x[None, :], 0.0), 1) / count * -scale * scale * scale).to(
            tl.float32
        )

    dx_at = dx + b * x_row + channel.to(tl.int64)[:, None] * x_channel
    for start in range(0, plane, POSITIONS):
        t = start + lanes
        mask = mine[:, None] & (t < plane)[None, :]
        grad = tl.load(g_at + t.to(tl.int64)[None, :] * g_position, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x_at + t.to(tl.int64)[None, :] * x_position, mask=mask, other=0.0).to(tl.float32)
        out = grad * gain[:, None] + ((value - center[:, None]) * slope[:, None] + shift[:, None])
        tl.store(dx_at + t.to(tl.int64)[None, :] * x_position, out, mask=mask)


def group_norm_backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of group normalization: (dx like x, dgamma float32 [B, C], dbeta float32 [B, C]).

    g, x [B, C, *], float32, bfloat16 or float16, each contiguous or channels_last (anything else is copied); mean, rstd
    [B, groups] as the forward saved them and weight [C] or None (ones), of any floating dtype, contiguous.

        dgamma[b,c] = sum_t g (x - mean) rstd      dbeta[b,c] = sum_t g
        dx = rstd (w g - mean_group(w g) - xhat mean_group(w g xhat))

    A value passes through at most 27 additions in float32; further ones are in float64. A sample that is not finite touches no
    other. Bits depend on the sample and the shape of one alone.
    """
    b, c = x.shape[:2]
    if not any(x.is_contiguous(memory_format=f) for f in _formats(x)):
        x = x.contiguous()
    dx = torch.empty_like(x)
    flat_g, flat_x, flat_dx = (t.flatten(2) if t.dim() > 2 else t.unsqueeze(2) for t in (g, x, dx))
    plane = flat_x.shape[2]
    dgamma, dbeta = (x.new_empty(b, c, dtype=torch.float32) for _ in range(2))
    if b == 0 or c == 0 or plane == 0:
        return dx, dgamma.zero_(), dbeta.zero_()
    packed, lanes, positions, warps = _tiling(c // groups, groups, plane, flat_x.stride(2) == 1)
    _group_norm_backward[(b * triton.cdiv(groups, packed),)](
        *(flat_g, flat_x, mean, rstd, weight, flat_dx, dgamma, dbeta),
        *(c, plane, groups, c // groups, *flat_g.stride(), *flat_x.stride()),
        GROUPS=packed,
        CHANNELS=lanes,
        POSITIONS=positions,
        STEPS=_STEPS,
        num_warps=warps,
    )
    return dx, dgamma, dbeta


def _formats(x: Tensor) -> list[torch.memory_format]:
    """Layouts in which the positions of x lie at even distances."""
    last = {4: [torch.channels_last], 5: [torch.channels_last_3d]}
    return [torch.contiguous_format, *last.get(x.dim(), [])]


def _tiling(members: int, groups: int, plane: int, by_channel: bool) -> tuple[int, int, int, int]:
    """(groups of a program, its channels and positions at a time, warps).

    Where channels lie side by side a program takes neighboring groups, or it would use a fraction of every
    cache line that it fetches; otherwise it does so only where a group is too small to keep it busy.
    """
    width = triton.next_power_of_2(plane)
    packed = max(1, min(_PACKED // members, groups))
    if by_channel:
        packed = max(1, min(packed, _TILE // (members * width)))
    lanes = triton.next_power_of_2(packed * members)
    # At least four positions a time, whatever the number of channels: fewer would waste what a fetch brings.
    positions = min(width, max(4, _TILE // lanes))
    values = lanes * positions
    return packed, lanes, positions, 1 if values <= 256 else 4 if values <= _TILE else 8


def aot() -> list[Variant]:
    sizes = ((4, 16, 1024), (32, 16, 16), (512, 1, 4))
    cases = [(dtype, *size) for dtype in ("fp32", "bf16") for size in sizes]
    return [
        _variant(*case, inner) for case in [*cases, ("fp16", *sizes[0])] for inner in ("position", "channel")
    ]


def _variant(dtype: str, members: int, groups: int, plane: int, inner: str) -> Variant:
    packed, lanes, positions, warps = _tiling(members, groups, plane, inner == "position")
    sizes = ["channels", "plane", "groups", "members", "g_row", "x_row"]
    sizes += [f"{t}_{d}" for t in "gx" for d in ("channel", "position") if d != inner]
    signature = {
        **dict.fromkeys(("g", "x", "dx"), f"*{dtype}"),
        **dict.fromkeys(("mean", "rstd", "weight", "dgamma", "dbeta"), "*fp32"),
        **dict.fromkeys(sizes, "i32"),
    }
    constants = {"GROUPS": packed, "CHANNELS": lanes, "POSITIONS": positions, "STEPS": _STEPS}
    constants |= {f"{t}_{inner}": 1 for t in "gx"}
    aligned = tuple(n for n in sizes if n not in ("groups", "members") and (n != "plane" or plane % 16 == 0))
    label = f"{dtype}, {groups} x {members} channels, {plane} positions, {inner} innermost"
    return Variant(_group_norm_backward, signature, constants, warps, label=label, divisible=aligned)
