"""The strategies' short names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch

from adaclip.clipping.base import NORM_KEY, Clipping
from adaclip.clipping.dc_sgd import DCSGDClipping
from adaclip.clipping.flat import FlatClipping
from adaclip.clipping.normalized import AutomaticClipping, PSACClipping
from adaclip.clipping.per_group import PerGroupClipping, has_norms, norms_of
from adaclip.clipping.per_layer import PerLayerClipping
from adaclip.clipping.quantile import AdaptiveClipping

__all__ = ["make_clipping"]

_STRATEGIES: dict[str, Callable[..., Clipping]] = {
    "flat": FlatClipping,
    "per_layer": PerLayerClipping,
    "per_layer_adaptive": partial(PerLayerClipping, quantile=0.5),
    "adaptive": AdaptiveClipping,
    "automatic": AutomaticClipping,
    "psac": PSACClipping,
    "dc_sgd": DCSGDClipping,
    "dc_sgd_error": partial(DCSGDClipping, criterion="error"),
}


def make_clipping(
    clipping: str | Clipping,
    max_grad_norm: float | Sequence[float] | None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Clipping:
    """The strategy named, with the threshold given (None: 1.0); or a copy of the object.

    Where parameter groups of the optimizer carry a "max_grad_norm", "flat" is flat in each of them: `PerGroupClipping`.

    Raises ValueError for an unknown name, a threshold beside an object of another one, and a strategy that parameter
    groups with norms of their own do not go with.
    """
    by_groups = optimizer is not None and has_norms(optimizer)
    if by_groups or clipping == PerGroupClipping.name or isinstance(clipping, PerGroupClipping):
        return _per_group(clipping, max_grad_norm, [] if optimizer is None else optimizer.param_groups)
    if isinstance(clipping, Clipping):
        if max_grad_norm is not None and max_grad_norm != clipping.max_grad_norm:
            raise ValueError(
                f"max_grad_norm must be left out where clipping is an object, which has its own "
                f"({clipping.max_grad_norm}), got {max_grad_norm}"
            )
        # A copy: strategies learn the number of layers, hold state, and may be given to two engines.
        return copy.deepcopy(clipping)
    if not isinstance(clipping, str) or clipping not in _STRATEGIES:
        known = sorted([*_STRATEGIES, PerGroupClipping.name])
        raise ValueError(f"clipping must be one of {known} or an adaclip.clipping object, got {clipping!r}")
    return _STRATEGIES[clipping](1.0 if max_grad_norm is None else max_grad_norm)


def _per_group(
    clipping: str | Clipping, max_grad_norm: float | Sequence[float] | None, groups: list[dict]
) -> Clipping:
    if isinstance(clipping, PerGroupClipping):
        strategy = copy.deepcopy(clipping)
    elif clipping in ("flat", PerGroupClipping.name):
        strategy = PerGroupClipping()
    else:
        raise ValueError(
            f"clipping must be 'flat', 'per_group' or a PerGroupClipping where parameter groups have a {NORM_KEY!r} "
            "of their own: every other strategy has its own norms or moves them, "
            f"got {getattr(clipping, 'name', clipping)!r}"
        )
    if max_grad_norm is not None:
        raise ValueError(
            f"max_grad_norm must be left out where the norms are in the parameter groups, got {max_grad_norm!r}"
        )
    norms_of(groups)
    return strategy
