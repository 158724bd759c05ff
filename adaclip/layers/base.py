"""What every layer kind provides to the engine.

A layer adapter replaces a module's `forward` (the module itself stays what it was), and at the end of
a backward turns what was recorded into a `Part`: an upper bound on each sample's squared gradient
norm, and a function that makes the weighted gradient once the factors are known.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from adaclip import ops, reference
from adaclip.layers.tape import Slot, Tape, Use
from adaclip.layout import laid_as
from adaclip.shards import is_sharded

__all__ = [
    "Gradients",
    "Layer",
    "Part",
    "ReplacedForward",
    "RootForward",
    "as_gradient",
    "lowered",
    "part_from_samples",
    "raised",
    "rounding_bound",
    "split_views",
    "sum_views",
]

Gradients = list[tuple[nn.Parameter, Tensor]]


@dataclass
class Part:
    """One layer's share of every sample's gradient.

    sqnorms: float64 [B], upper bounds on the squared norms of this layer's per-sample gradients.
    weigh: factors float32 [B] -> the parameters' weighted gradients `sum_b factors_b g_b`.
    held: bytes that `weigh` keeps alive, so that the largest can be released first.
    """

    sqnorms: Tensor
    weigh: Callable[[Tensor], Gradients]
    held: int


class ReplacedForward:
    """A callable in the place of a module's `forward`; the module's class stays what it was."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.original = module.forward
        self._previous = module.__dict__.get("forward")

    def attach(self) -> None:
        self.module.forward = self

    def detach(self) -> None:
        if self._previous is None:
            del self.module.forward
        else:
            self.module.forward = self._previous

    # A copied or pickled model is an ordinary one, with its class's own forward or its user's patch.
    def __deepcopy__(self, memo):
        if self._previous is not None:
            return copy.deepcopy(self._previous, memo)
        return _class_forward(memo[id(self.module)])

    def __reduce__(self):
        if self._previous is not None:
            return _itself, (self._previous,)
        return _class_forward, (self.module,)


def _class_forward(module: nn.Module):
    return types.MethodType(type(module).forward, module)


def _itself(forward: Callable):
    return forward


class RootForward(ReplacedForward):
    """Counts the forward passes of the whole model, so that each is known to get one backward.

    away: a context for forward passes of evaluation, which are of the parameters themselves even where
      gradients are taken at another point.
    """

    def __init__(
        self, module: nn.Module, tape: Tape, away: Callable[[], AbstractContextManager] = nullcontext
    ):
        super().__init__(module)
        self.tape = tape
        self.away = away

    def __call__(self, *args, **kwargs):
        learning = self.module.training and torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            if not learning:
                run = self.original if self.away is nullcontext else self._evaluate
                return run(*args, **kwargs)
            # Operations, not the numbers themselves: a changing one would recompile the model at every step.
            torch.ops.adaclip.mark(self.tape.ticket, self.tape.number, False)
            result = self.original(*args, **kwargs)
            torch.ops.adaclip.mark(self.tape.ticket, self.tape.number, True)
            return result
        if not learning:
            return self._evaluate(*args, **kwargs)
        self.tape.enter()
        try:
            return self.original(*args, **kwargs)
        finally:
            self.tape.leave()

    @torch.compiler.disable(
        reason="adaclip moves the parameters back from the point where gradients are taken"
    )
    def _evaluate(self, *args, **kwargs):
        with self.away():
            return self.original(*args, **kwargs)


class Layer(ReplacedForward):
    """A module whose per-sample gradients the engine forms. Subclasses: one per layer kind."""

    # Whether its norms are made without reading a value of a GPU back, so that a CUDA graph can hold them.
    capturable = True

    def __init__(self, name: str, module: nn.Module, tape: Tape, root: nn.Module, backend: str):
        super().__init__(module)
        self.name = name
        self.root = root
        self.backend = backend
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.slot: Slot = tape.new_slot(device)

    def __call__(self, *args, **kwargs):
        # Evaluation keeps the ordinary forward: its gradients (saliency maps, say) are the user's.
        if not (torch.is_grad_enabled() and self.root.training and self.trainable()):
            return self.original(*args, **kwargs)
        return self.forward(*args, **kwargs)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters this layer answers for."""
        return [p for p in self.module._parameters.values() if p is not None]

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def forward(self, input: Tensor) -> Tensor:
        """The module's forward through a recording operation; arguments are named as torch names them."""
        raise TypeError(f"{type(self).__name__} has no forward")

    def rows(self, use: Use) -> int:
        """How many samples a use holds."""
        return use.tensors[0].shape[0] // use.views

    def fold(self, use: Use, views: int) -> Use:
        """The use of samples that are seen `views` times each, from one whose every view is a row.

        Rows are in the loader's order, b * views + v. A sample's gradient is the sum over its views, and what
        is bounded is the norm of that sum: the kinds that sum over positions count views as positions.
        Called before everything else that is asked of a use.

        Raises:
            RuntimeError: the rows are not a multiple of `views`.
        """
        rows = use.tensors[0].shape[0]
        if rows % views:
            raise RuntimeError(
                f"{self.name or 'the model'} has seen {rows} rows, which must be {views} views of every sample, "
                "one after the other"
            )
        return use if views == 1 else self._fold(use, views)

    def _fold(self, use: Use, views: int) -> Use:
        return replace(use, views=views)

    def merge(self, uses: list[Use]) -> Use | None:
        """One use with the same per-sample gradients as all of `uses`, where the layer kind has one."""
        return uses[0] if len(uses) == 1 else None

    def measure(self, use: Use, wanted: set[nn.Parameter]) -> Part:
        """Norm bounds and weighted gradients of the parameters in `wanted`, for one use."""
        return part_from_samples(self.sample_grads(use, wanted), self.backend)

    def sample_grads(self, use: Use, wanted: set[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        """The per-sample gradients [B, *p.shape] of the parameters in `wanted`, for one use, views summed."""
        raise TypeError(f"{type(self).__name__} has no per-sample gradients")


def part_from_samples(grads: dict[nn.Parameter, Tensor], backend: str) -> Part:
    """A part whose per-sample gradients are at hand: the norms are those of what is summed."""
    sqnorms = sum(ops.row_sqnorms(v, backend=backend) for v in grads.values())

    def weigh(factors: Tensor) -> Gradients:
        return [as_gradient(p, ops.weighted_sum(v, factors, backend=backend)) for p, v in grads.items()]

    return Part(sqnorms, weigh, sum(v.numel() * v.element_size() for v in grads.values()))


def split_views(t: Tensor, views: int) -> Tensor:
    """[B V, ...] -> [B, V, ...], without a copy where the strides allow it."""
    return t.reshape(t.shape[0] // views, views, *t.shape[1:])


def sum_views(t: Tensor, views: int) -> Tensor:
    """[B V, ...] -> [B, ...], summed in at least float32."""
    return t if views == 1 else split_views(t, views).sum(1, dtype=reference.wide_dtype(t.dtype))


def as_gradient(p: nn.Parameter, total: Tensor) -> tuple[nn.Parameter, Tensor]:
    """(p, total), total in p's dtype, in float32 if that has 16 bits, and strided as p is.

    Each sample's contribution is bounded up to here, in at least float32. A sum rounded to 16 bits would move by more
    than a contribution when a sample joins.
    """
    total = total.to(reference.wide_dtype(p.dtype))
    # What makes the sum may order dimensions otherwise (channels_last); the fused update needs the parameter's order.
    return p, (total if is_sharded(p) else laid_as(total, p))


def lowered(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What convolutions and linear layers get under an active `torch.autocast`: its dtype, as in torch.

    Cast here and not by torch: the operations record what they were given.
    """
    dtype = ops.autocast_dtype(tensors[0].device)
    if dtype is None:
        return tensors
    return tuple(t.to(dtype) if t is not None and _casts(t) else t for t in tensors)


def raised(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What normalizations get under an active `torch.autocast`: float32, as torch gives them on a GPU."""
    if ops.autocast_dtype(tensors[0].device) is None:
        return tensors
    return tuple(t.float() if t is not None and _casts(t) else t for t in tensors)


def _casts(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype != torch.float64


def rounding_bound(sqnorms: Tensor, magnitudes: Tensor, rounding: ops.Rounding) -> Tensor:
    """Upper bounds on the squared norms of gradients as their weighted sum adds them; float64 [B].

    `sqnorms` are those of the exact gradient. The sum itself rounds: each of its entries carries an
    error proportional to the unit round-off u and to sqrt(M), M the magnitude: the norm the gradient would
    have if no two positions canceled. 2u sqrt(M) covers the random-walk error of a blocked sum. Where
    cancellation is severe (sqrt(M) > 256 norms: no ordinary gradient, but an adversary's), the worst
    case of `terms` roundings in a row is added; it only clips such a sample harder. `terms` must be public:
    with the batch's size in it, one sample could tell by another's norm.

    Where the product's operands are rounded as well (to 16 bits or TF32, on a GPU), that is another
    `operands` sqrt(M), in full: these errors are as far apart from each other as a sample's values make them.
    """
    unit, terms, operands = rounding
    norms, scales = sqnorms.clamp_min(0).sqrt(), magnitudes.sqrt()
    adding = terms * unit * (scales - 256 * norms).clamp_min(0)
    return (norms + (2 * unit + operands) * scales + adding).square()
