"""Models that have been through `torch.compile`, as a whole or in parts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["plain_module", "plain_names", "renamed"]

_WRAPPED = "_orig_mod."


def plain_module(module: nn.Module) -> nn.Module:
    """The module itself, from what `torch.compile` made of it."""
    # Importing it takes a second; who has compiled a model has done so.
    frames = sys.modules.get("torch._dynamo.eval_frame")
    while frames is not None and isinstance(module, frames.OptimizedModule):
        module = module._orig_mod
    return module


def plain_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict under the names that it has without `torch.compile`."""
    return {name.replace(_WRAPPED, ""): value for name, value in state.items()}


def renamed(state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of plain names under those of `like`, a model of which other parts may be compiled."""
    ours = {name.replace(_WRAPPED, ""): name for name in like}
    return {ours.get(name, name): value for name, value in state.items()}
