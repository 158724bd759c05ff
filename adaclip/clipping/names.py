"""The strategies' short names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

from adaclip.clipping.base import Clipping
from adaclip.clipping.dc_sgd import DCSGDClipping
from adaclip.clipping.flat import FlatClipping
from adaclip.clipping.normalized import AutomaticClipping, PSACClipping
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


def make_clipping(clipping: str | Clipping, max_grad_norm: float | Sequence[float] | None) -> Clipping:
    """The strategy named, with the threshold given (None: 1.0); or a copy of the object.

    Raises ValueError for an unknown name, or a threshold beside an object of another one.
    """
    if isinstance(clipping, Clipping):
        if max_grad_norm is not None and max_grad_norm != clipping.max_grad_norm:
            raise ValueError(
                f"max_grad_norm must be left out where clipping is an object, which has its own "
                f"({clipping.max_grad_norm}), got {max_grad_norm}"
            )
        # A copy: strategies learn the number of layers, hold state, and may be given to two engines.
        return copy.deepcopy(clipping)
    if not isinstance(clipping, str) or clipping not in _STRATEGIES:
        raise ValueError(
            f"clipping must be one of {sorted(_STRATEGIES)} or an adaclip.clipping object, got {clipping!r}"
        )
    return _STRATEGIES[clipping](1.0 if max_grad_norm is None else max_grad_norm)
