"""Training schemes: named sets of `adaclip train` settings. Needs no torch.

A scheme decides how gradients are clipped, what is released and how the optimizer descends. What it leaves alone is
the recipe of the data set, the same for every scheme: model, batch size, length, ε, δ, averaging of the weights, label
smoothing, augmentation. Learning rates here are starting points: a data set's config may hold better ones in a table
[scheme.NAME].

`adaptive` is the four-step scheme of Cheng, Shang, Jiang, Du (2026): (1) a clipping norm that follows a private
quantile of the gradients' norms, (2) private statistics of label groups, with the selected group reported, (3) the
tight accountant, (4) descent with the noise's variance removed and a conditional floor, and a smoothed loss whose
radius depends on the signal. The `adaptive-…` ablations are the same scheme with one step less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ABLATIONS", "OWNED", "SCHEMES", "Scheme", "chain"]


@dataclass(frozen=True)
class Scheme:
    """A named set of settings.

    Attributes:
        title: what it is, in a line.
        settings: of `TrainConfig`, by name.
        base: the scheme whose settings (and [scheme.NAME] tables) stand below this one's.
    """

    title: str
    settings: Mapping[str, Any]
    base: str | None = None


# Every scheme says all of this, so that nothing is left over from the data set's default recipe.
_PLAIN: dict[str, Any] = {
    "clipping": "flat",
    "max_grad_norm": 1.0,
    "groups": "off",
    "smoothing": 0.0,
    "accountant": "pld",
    "weight_decay": 0.0,
}
_SGD: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.0, "lr": 4.0}
_MOMENTUM: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.9, "lr": 1.0}


def _adam(optimizer: str, lr: float) -> dict[str, Any]:
    return {"optimizer": optimizer, "lr": lr}


SCHEMES: dict[str, Scheme] = {
    "adaptive": Scheme(
        "all four steps",
        {
            **_PLAIN,
            "clipping": "adaptive",
            "quantile": 0.5,
            "groups": "report",
            **_adam("noise-nadam", 0.02),
            "floor": 1.0,
            "smoothing": 0.01,
            "smoothing_signal": "snr",
        },
    ),
    "dpsgd": Scheme("DP-SGD, fixed C", {**_PLAIN, **_SGD}),
    "dp-momentum": Scheme("DP-SGD with momentum 0.9, fixed C", {**_PLAIN, **_MOMENTUM}),
    "dp-adam": Scheme("DP-Adam, fixed C", {**_PLAIN, **_adam("adam", 0.02)}),
    "dp-adambc": Scheme("DP-AdamBC, fixed C", {**_PLAIN, **_adam("adambc", 0.02)}),
    "dp-nadam": Scheme("DP-Nadam, fixed C", {**_PLAIN, **_adam("nadam", 0.02)}),
    "auto-s": Scheme("automatic clipping (AUTO-S), SGD", {**_PLAIN, **_SGD, "clipping": "automatic"}),
    "psac": Scheme("DP-PSAC, SGD", {**_PLAIN, **_SGD, "clipping": "psac"}),
    # C grows to the size of the gradients, and the step with it: a smaller rate than at C = 1.
    "dc-sgd": Scheme("DC-SGD, C by percentile, SGD", {**_PLAIN, **_SGD, "lr": 0.3, "clipping": "dc_sgd"}),
    "dc-sgd-error": Scheme(
        "DC-SGD, C by expected error, SGD", {**_PLAIN, **_SGD, "lr": 0.3, "clipping": "dc_sgd_error"}
    ),
    "per-layer": Scheme("a fixed C for every layer, SGD", {**_PLAIN, **_SGD, "clipping": "per_layer"}),
    # Nothing is clipped at such a norm and no noise is drawn: ordinary SGD on Poisson batches, ε infinite.
    "non-private": Scheme(
        "SGD with momentum, no clipping, no noise",
        {**_PLAIN, **_MOMENTUM, "lr": 0.1, "noise_multiplier": 0.0, "max_grad_norm": 1e6},
    ),
    "adaptive-flat": Scheme("adaptive without step 1: fixed C", {"clipping": "flat"}, "adaptive"),
    "adaptive-no-groups": Scheme("adaptive without step 2: no label groups", {"groups": "off"}, "adaptive"),
    "adaptive-rdp": Scheme("adaptive without step 3: RDP accountant", {"accountant": "rdp"}, "adaptive"),
    "adaptive-no-smoothed-loss": Scheme(
        "adaptive without step 4a: no smoothed loss", {"smoothing": 0.0}, "adaptive"
    ),
    "adaptive-no-correction": Scheme(
        "adaptive without step 4b: plain Nadam", _adam("nadam", 0.02), "adaptive"
    ),
    "adaptive-no-ema": Scheme("adaptive without averaged weights", {"ema": 0.0}, "adaptive"),
}
ABLATIONS = tuple(name for name, scheme in SCHEMES.items() if scheme.base == "adaptive")
_DETAILS = (
    "clip_rate",
    "quantile_noise",
    "group_noise",
    "count_noise",
    "filter_gain",
    "norm_schedule",
    "noise_schedule",
)
# What schemes decide, or a [scheme.NAME] table for one. Not the budget: only the run without privacy has none.
OWNED = frozenset(key for scheme in SCHEMES.values() for key in scheme.settings).union(_DETAILS) - {
    "noise_multiplier",
    "ema",
}


def chain(name: str) -> list[str]:
    """The scheme's name after those of the schemes it is based on. Raises ValueError for an unknown one."""
    if name not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {name!r}")
    base = SCHEMES[name].base
    return [*([] if base is None else chain(base)), name]
