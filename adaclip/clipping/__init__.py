"""Clipping strategies: how per-sample gradients are bounded, and what noise covers the bounded sum.

A strategy bounds what one example adds to a step's sum, in one group of parameters (flat clipping) or one
a layer, by thresholds C_t that it may move from step to step on what earlier steps released. Each class
says what it releases, its sensitivity, and how the noise multiplier is split when a step releases more
than the gradient (`adaclip.step_release`).
"""

from adaclip.clipping.base import (
    NORM_KEY,
    SLACK,
    Clipping,
    Rule,
    Setting,
    SideRelease,
    SplitRelease,
    check_norm,
    clip_factors,
)
from adaclip.clipping.dc_sgd import DCSGDClipping
from adaclip.clipping.flat import FlatClipping
from adaclip.clipping.names import make_clipping
from adaclip.clipping.normalized import AutomaticClipping, PSACClipping
from adaclip.clipping.per_group import PerGroupClipping
from adaclip.clipping.per_layer import PerLayerClipping
from adaclip.clipping.quantile import AdaptiveClipping, QuantileThresholds

__all__ = [
    "NORM_KEY",
    "SLACK",
    "AdaptiveClipping",
    "AutomaticClipping",
    "Clipping",
    "DCSGDClipping",
    "FlatClipping",
    "PSACClipping",
    "PerGroupClipping",
    "PerLayerClipping",
    "QuantileThresholds",
    "Rule",
    "Setting",
    "SideRelease",
    "SplitRelease",
    "check_norm",
    "clip_factors",
    "make_clipping",
]
