"""Differentiable layer operations: `torch.ops.adaclip.{conv,linear,embedding,group_norm,layer_norm,frozen_norm}`.

Each computes the ordinary forward. Its autograd formula computes the input gradient, never the
ordinary parameter gradient, and records what the per-sample step needs. All end with the arguments
(ticket, slot, forward, copy) of `tape.Slot.call_args`. Parameters are inputs so that autograd asks
for the backward even where the data needs no gradient; they receive none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from adaclip import ops, reference
from adaclip.layers import tape

__all__ = ["conv", "embedding", "frozen_norm", "group_norm", "layer_norm", "linear", "mark", "record"]


# What Python does in a step is not in a CUDA graph that inductor makes of it; the tag keeps it from making one.
_IN_PYTHON = (torch.Tag.cudagraph_unsafe,)


@custom_op("adaclip::record", mutates_args=("ticket",), tags=_IN_PYTHON)
def record(ticket: Tensor, tensors: list[Tensor], slot: int, forward: int, copy: bool) -> None:
    tape.record(tensors, slot, forward, copy)


@record.register_fake
def _(ticket, tensors, slot, forward, copy):
    return None


@custom_op("adaclip::mark", mutates_args=("ticket",), tags=_IN_PYTHON)
def mark(ticket: Tensor, tape_number: int, ends: bool) -> None:
    tape.mark(tape_number, ends)


@mark.register_fake
def _(ticket, tape_number, ends):
    return None


def _register(op, forward, setup, backward):
    op.register_fake(forward)
    op.register_autograd(backward, setup_context=setup)


def _save(ctx, ticket, slot, forward, copy, *tensors):
    ctx.save_for_backward(*tensors)
    # Not saved like the others: autograd would notice that it was mutated, in eager mode before we can explain a second
    # backward, and where a layer is used twice in one compiled graph, whose uses share a ticket.
    ctx.ticket = ticket
    ctx.record = slot, forward, copy


def _saved(ctx):
    return *ctx.saved_tensors, ctx.ticket


# --- convolution: records x, g, and with save_output the products <y, g> per output channel ---------


def _conv(x, weight, bias, stride, padding, dilation, groups, save_output, ticket, slot, forward, copy):
    n = len(stride)
    return torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, [0] * n, groups)


@custom_op("adaclip::conv", mutates_args=())
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    save_output: bool,
    ticket: Tensor,
    slot: int,
    forward: int,
    copy: bool,
) -> Tensor:
    tape.called(slot, copy)
    return _conv(x, weight, bias, stride, padding, dilation, groups, save_output, ticket, slot, forward, copy)


def _conv_setup(ctx, inputs, output):
    x, weight, _, *ctx.geometry, save_output = inputs[:8]
    _save(ctx, *inputs[8:], x, weight, *([output] if save_output else []))


def _conv_backward(ctx, g):
    x, weight, *output, ticket = _saved(ctx)
    stride, padding, dilation, groups = ctx.geometry
    dots = [(reference.wide(y) * reference.wide(g)).flatten(2).sum(-1, dtype=torch.float64) for y in output]
    torch.ops.adaclip.record(ticket, [x, g, *dots], *ctx.record)
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.aten.convolution_backward(
            g,
            x,
            weight,
            None,
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            groups,
            [True, False, False],
        )[0]
    return dx, *[None] * 11


_register(conv, _conv, _conv_setup, _conv_backward)


# --- linear: records x, g --------------------------------------------------------------------------


def _linear(x, weight, bias, ticket, slot, forward, copy):
    return F.linear(x, weight, bias)


@custom_op("adaclip::linear", mutates_args=())
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, ticket: Tensor, slot: int, forward: int, copy: bool
) -> Tensor:
    tape.called(slot, copy)
    return _linear(x, weight, bias, ticket, slot, forward, copy)


def _linear_setup(ctx, inputs, output):
    x, weight, _ = inputs[:3]
    _save(ctx, *inputs[3:], x, weight)


def _linear_backward(ctx, g):
    x, weight, ticket = _saved(ctx)
    torch.ops.adaclip.record(ticket, [x, g], *ctx.record)
    return (g @ weight if ctx.needs_input_grad[0] else None), *[None] * 6


_register(linear, _linear, _linear_setup, _linear_backward)


# --- embedding: records indices, g -----------------------------------------------------------------


def _embedding(indices, weight, ticket, slot, forward, copy):
    return F.embedding(indices, weight)


@custom_op("adaclip::embedding", mutates_args=())
def embedding(indices: Tensor, weight: Tensor, ticket: Tensor, slot: int, forward: int, copy: bool) -> Tensor:
    tape.called(slot, copy)
    return _embedding(indices, weight, ticket, slot, forward, copy)


def _embedding_setup(ctx, inputs, output):
    _save(ctx, *inputs[2:], inputs[0])


def _embedding_backward(ctx, g):
    indices, ticket = _saved(ctx)
    torch.ops.adaclip.record(ticket, [indices, g], *ctx.record)
    return (None,) * 6


_register(embedding, _embedding, _embedding_setup, _embedding_backward)


# --- group normalization: records the per-sample gradients of scale and shift ------------------------


def _group_norm(x, weight, bias, groups, eps, backend, ticket, slot, forward, copy):
    b, c = x.shape[:2]
    # torch's kernel reads all three as if they were contiguous.
    x, weight, bias = (None if t is None else t.contiguous() for t in (x, weight, bias))
    return torch.ops.aten.native_group_norm(x, weight, bias, b, c, x.numel() // max(1, b * c), groups, eps)


@custom_op("adaclip::group_norm", mutates_args=())
def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    backend: str,
    ticket: Tensor,
    slot: int,
    forward: int,
    copy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tape.called(slot, copy)
    return _group_norm(x, weight, bias, groups, eps, backend, ticket, slot, forward, copy)


def _group_norm_setup(ctx, inputs, output):
    x, weight, _, ctx.groups, _, ctx.backend = inputs[:6]
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    _save(ctx, *inputs[6:], x, weight, mean, rstd)


@custom_op("adaclip::group_norm_backward", mutates_args=())
def _group_norm_grads(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, groups: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return ops.group_norm_backward(g, x, mean, rstd, weight, groups, backend)


@_group_norm_grads.register_fake
def _(g, x, mean, rstd, weight, groups, backend):
    rows = x.new_empty(x.shape[:2], dtype=reference.wide_dtype(x.dtype))
    return torch.empty_like(x), rows, torch.empty_like(rows)


def _group_norm_backward(ctx, g, _mean, _rstd):
    x, weight, mean, rstd, ticket = _saved(ctx)
    dx, dgamma, dbeta = torch.ops.adaclip.group_norm_backward(
        g, x, mean, rstd, weight, ctx.groups, ctx.backend
    )
    torch.ops.adaclip.record(ticket, [dgamma, dbeta], *ctx.record)
    return (dx if ctx.needs_input_grad[0] else None), *[None] * 9


_register(group_norm, _group_norm, _group_norm_setup, _group_norm_backward)


# --- layer normalization: records the per-sample gradients of scale and shift ------------------------


def _layer_norm(x, weight, bias, normalized, eps, ticket, slot, forward, copy):
    return torch.ops.aten.native_layer_norm(x, normalized, weight, bias, eps)


@custom_op("adaclip::layer_norm", mutates_args=())
def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized: list[int],
    eps: float,
    ticket: Tensor,
    slot: int,
    forward: int,
    copy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tape.called(slot, copy)
    return _layer_norm(x, weight, bias, normalized, eps, ticket, slot, forward, copy)


def _layer_norm_setup(ctx, inputs, output):
    x, weight, bias, ctx.normalized, _ = inputs[:5]
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    _save(ctx, *inputs[5:], x, weight, bias, mean, rstd)


def _layer_norm_backward(ctx, g, _mean, _rstd):
    x, weight, bias, mean, rstd, ticket = _saved(ctx)
    positions = list(range(1, x.dim() - len(ctx.normalized)))
    shift = reference.wide(g)
    scale = (reference.wide(x) - mean) * rstd * shift
    # sum over an empty list of dimensions would be a sum over all of them
    scale, shift = (t.sum(positions) if positions else t for t in (scale, shift))
    torch.ops.adaclip.record(ticket, [scale, shift], *ctx.record)
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.aten.native_layer_norm_backward(
            g.contiguous(), x, ctx.normalized, mean, rstd, weight, bias, [True, False, False]
        )[0]
    return dx, *[None] * 8


_register(layer_norm, _layer_norm, _layer_norm_setup, _layer_norm_backward)


# --- normalization by constants: records the per-sample gradients of scale and shift -------------------


def _frozen_norm(x, weight, bias, mean, var, eps, ticket, slot, forward, copy):
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


@custom_op("adaclip::frozen_norm", mutates_args=())
def frozen_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    ticket: Tensor,
    slot: int,
    forward: int,
    copy: bool,
) -> Tensor:
    tape.called(slot, copy)
    return _frozen_norm(x, weight, bias, mean, var, eps, ticket, slot, forward, copy)


def _frozen_norm_setup(ctx, inputs, output):
    x, weight, _, mean, var, ctx.eps = inputs[:6]
    _save(ctx, *inputs[6:], x, weight, mean, var)


def _frozen_norm_backward(ctx, g):
    x, weight, mean, var, ticket = _saved(ctx)
    along = [-1, *[1] * (x.dim() - 2)]
    positions = list(range(2, x.dim()))
    rstd = (reference.wide(var) + ctx.eps).rsqrt()
    shift = reference.wide(g)
    scale = (reference.wide(x) - mean.reshape(along)) * rstd.reshape(along) * shift
    # sum over an empty list of dimensions would be a sum over all of them
    scale, rows = (t.sum(positions) if positions else t for t in (scale, shift))
    torch.ops.adaclip.record(ticket, [scale, rows], *ctx.record)
    dx = None
    if ctx.needs_input_grad[0]:
        slope = rstd if weight is None else rstd * weight
        dx = (shift * slope.reshape(along)).to(x.dtype)
    return dx, *[None] * 9


_register(frozen_norm, _frozen_norm, _frozen_norm_setup, _frozen_norm_backward)
