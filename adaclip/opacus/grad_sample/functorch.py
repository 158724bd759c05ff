"""`opacus.grad_sample.functorch`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adaclip.opacus._replacements import raise_import_error

__all__ = ["make_functional"]


def make_functional(
    mod: nn.Module, disable_autograd_tracking: bool = False
) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """(a function of parameters and inputs that computes `mod`, its parameters in the module's order).

    The function holds a copy of the module without values, so it goes on computing what `mod` was; buffers are
    copied as they are.
    """
    named = dict(mod.named_parameters())
    names = list(named)
    # The parameters' values are not copied: each is replaced by an empty one before the copy is made.
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in named.values()}
    stateless = copy.deepcopy(mod, memo)

    def function(params: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(stateless, dict(zip(names, params, strict=True)), args, kwargs)

    values = tuple(p.detach() if disable_autograd_tracking else p for p in named.values())
    return function, values


def __getattr__(name: str) -> Any:
    raise_import_error(__name__, name)
