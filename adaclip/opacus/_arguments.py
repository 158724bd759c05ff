"""What Opacus's arguments are in adaclip's terms."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from adaclip.clipping import AdaptiveClipping, Clipping, PerLayerClipping

__all__ = ["MODES", "SEARCH", "strategy_of", "with_reduction"]

# All of them are one backward here. "ghost" modes also return the criterion, as Opacus's do.
MODES = ("hooks", "functorch", "ew", "ghost", "ghost_fsdp")
# Opacus's names for the arguments of AdaptiveClipping; it wants all of them.
_ADAPTIVE = (
    "target_unclipped_quantile",
    "clipbound_learning_rate",
    "max_clipbound",
    "min_clipbound",
    "unclipped_num_std",
)
# For Opacus's searches, which end where it is told; ours end within 0.1 % of the target.
SEARCH = ("epsilon_tolerance", "eps_error", "delta_error", "alphas")


def strategy_of(
    clipping: str | Clipping, max_grad_norm: float | Sequence[float], options: dict[str, Any]
) -> tuple[str | Clipping, float | Sequence[float] | None]:
    """What adaclip calls that clipping, and the norm beside it; takes Opacus's adaptive arguments from `options`."""
    given = {name: options.pop(name) for name in _ADAPTIVE if name in options}
    if given and clipping != "adaptive":
        raise TypeError(f"{', '.join(given)} must come with clipping='adaptive', got {clipping!r}")
    if given and len(given) < len(_ADAPTIVE):
        raise TypeError(
            f"clipping='adaptive' needs all or none of {', '.join(_ADAPTIVE)}, got {sorted(given)}"
        )
    if given:
        strategy = AdaptiveClipping(
            max_grad_norm,
            quantile=given["target_unclipped_quantile"],
            rate=given["clipbound_learning_rate"],
            sigma_b=given["unclipped_num_std"],
            accelerate=False,
            bounds=(given["min_clipbound"], given["max_clipbound"]),
        )
        return strategy, None
    if clipping == "per_layer":
        # Opacus's layers are parameters, with equal noise in all of them.
        return PerLayerClipping(max_grad_norm, allocation="equal", per_parameter=True), None
    return clipping, max_grad_norm


def with_reduction(criterion: nn.Module | None, loss_reduction: str) -> nn.Module:
    """A copy with that reduction, which is what Opacus's wrapper computes whatever the criterion's own is."""
    criterion = nn.CrossEntropyLoss() if criterion is None else copy.copy(criterion)
    if hasattr(criterion, "reduction"):
        criterion.reduction = loss_reduction
    return criterion
