"""VGG networks (Simonyan & Zisserman 2015, arXiv 1409.1556) with GroupNorm, and two small ones for DP-SGD."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from adaclip.layers.ws_conv import WSConv2d

# Table 1 of the paper, columns A, B, D, E: output channels of 3x3 convolutions; "M" is a 2x2 max pool.
PLANS: dict[str, list[int | str]] = {
    "vgg11": [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "vgg13": [64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "vgg16": [64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M"],
    "vgg19": [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"],
    # Few enough parameters for the noise of DP-SGD, with resolution kept longer.
    "vgg-small": [64, 64, "M", 128, 128, "M", 256, 256, "M"],
    "vgg-mini": [16, 16, "M", 32, 32, "M", 64, 64, "M"],
}
# What differs from ``build``'s defaults for the small ones.
SMALL: dict[str, dict[str, Any]] = {
    "vgg-small": {"weight_standardization": True},
    "vgg-mini": {"weight_standardization": True, "groups": 4},
}
NAMES = tuple(PLANS)
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
MIN_SIZE = 28  # of the paper's networks, pixels


class VGG(nn.Module):
    """Convolutional ``features`` and a ``classifier``; made by ``build``.

    forward: float [B, in_channels, H, W] -> logits [B, num_classes].

    Attributes:
        features: nn.Sequential (state dict keys ``features.0.weight``, …).
        classifier: nn.Sequential (keys ``classifier.out.weight``, …; with the FC stack also
            ``classifier.fc1.weight``, …; the same keys for every dropout).
        config: plain JSON-able dict; ``build(**model.config)`` makes the same network.
    """

    def __init__(self, features: nn.Sequential, classifier: nn.Sequential, config: dict[str, Any]) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier
        self.config = config

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.features(input))


def build(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int | Sequence[int] = 32,
    norm: str = "group",
    groups: int | None = None,
    weight_standardization: bool | None = None,
    head: str = "pool",
    fc_width: int | None = None,
    dropout: float = 0.0,
    width: int | None = None,
    activation: str = "relu",
    plan: Sequence[int | str] | None = None,
) -> VGG:
    """Build a VGG network.

    Every 3x3 convolution (stride 1, padding 1) is followed by its norm and the activation. A 2x2 max pool
    that would leave less than one pixel is left out (so 28-pixel images pass all five stages: 28, 14, 7, 3,
    1, 1). A convolution has a bias only without a norm: behind one, the norm's own shift does its work, and
    DP-SGD pays for every parameter with noise. Weights come from torch's global random generator.

    Args:
        name: "vgg11", "vgg13", "vgg16", "vgg19" (the paper's A, B, D, E), "vgg-small"
            (64-64-M-128-128-M-256-256-M with standardized weights, the layers of De et al. 2022, arXiv
            2204.13650) or "vgg-mini" (the same at a quarter of the width, for MNIST-sized images).
        num_classes: >= 2.
        in_channels: 1, 3 or any other positive number.
        image_size: H = W, or (H, W), in pixels; at least 28 for the paper's networks, 8 for the small ones
            and for a plan. With head="pool" other sizes may be given to forward as well.
        norm: "group" (GroupNorm; Wu & He 2018) or "none". Batch norm mixes the samples of a batch, so that
            no per-sample gradient exists.
        groups: of each GroupNorm; where it does not divide the channels, or would leave one value alone in
            its group, the largest smaller number that does. None: 16 (vgg-mini: 4).
        weight_standardization: use ``WSConv2d``; needs norm="group". None: False (the small ones: True).
        head: "pool" (global average pool, one linear layer) or "fc" (the paper's three linear layers).
        fc_width: of the two hidden layers of head="fc". None: the paper's 4096, or the number of features
            where that is smaller (512 at 32 pixels, 2048 at 64, 4096 from 96 on).
        dropout: probability in [0, 1) before the last linear layer (head="pool") or after each hidden one
            (head="fc"; the paper: 0.5).
        width: channels of the first convolution; all others scale with it. None: the plan's own.
        activation: one of "relu", "tanh", "elu", "gelu", "silu".
        plan: channels and "M" for pools in place of the named plan.

    Returns:
        the network in training mode, with ``config`` set.

    Raises:
        ValueError, TypeError: an argument out of its range; the message names it.
    """
    if name not in PLANS:
        raise ValueError(f"name must be one of {', '.join(PLANS)}, got {name!r}")
    config: dict[str, Any] = {
        "name": name,
        "num_classes": _whole("num_classes", num_classes, 2),
        "in_channels": _whole("in_channels", in_channels, 1),
        "image_size": _size(image_size, 8 if name in SMALL or plan is not None else MIN_SIZE),
        "norm": _choice("norm", norm, ("group", "none")),
        "groups": _whole("groups", SMALL.get(name, {}).get("groups", 16) if groups is None else groups, 1),
        "weight_standardization": (
            norm == "group" and name in SMALL if weight_standardization is None else weight_standardization
        ),
        "head": _choice("head", head, ("pool", "fc")),
        "fc_width": None if fc_width is None else _whole("fc_width", fc_width, 1),
        "dropout": _probability(dropout),
        "width": None if width is None else _whole("width", width, 1),
        "activation": _choice("activation", activation, tuple(ACTIVATIONS)),
        "plan": None if plan is None else _plan(plan),
    }
    if not isinstance(config["weight_standardization"], bool):
        raise TypeError(f"weight_standardization must be a bool, got {weight_standardization!r}")
    if config["weight_standardization"] and norm != "group":
        raise ValueError(f'weight_standardization must come with norm="group", got norm={norm!r}')
    features, channels, size = _features(config)
    model = VGG(features, _classifier(config, channels, size), config)
    _initialize(model)
    return model


def _features(config: dict[str, Any]) -> tuple[nn.Sequential, int, tuple[int, int]]:
    """The convolutional part, and the channels and (H, W) that leave it."""
    plan = config["plan"] or PLANS[config["name"]]
    scale = 1.0 if config["width"] is None else config["width"] / next(c for c in plan if c != "M")
    grouped = config["norm"] == "group"
    conv = WSConv2d if config["weight_standardization"] else nn.Conv2d
    size, channels, layers = config["image_size"], config["in_channels"], []
    h, w = (size, size) if isinstance(size, int) else size
    for step in plan:
        if step == "M":
            if min(h, w) >= 2:
                layers.append(nn.MaxPool2d(2))
                h, w = h // 2, w // 2
            continue
        out = max(1, round(step * scale))
        layers.append(conv(channels, out, 3, padding=1, bias=not grouped))
        if grouped:
            layers.append(nn.GroupNorm(_groups(config["groups"], out, h * w), out))
        layers.append(_activation(config["activation"]))
        channels = out
    return nn.Sequential(*layers), channels, (h, w)


def _classifier(config: dict[str, Any], channels: int, size: tuple[int, int]) -> nn.Sequential:
    # Named, so that the keys do not depend on the dropout.
    layers: list[tuple[str, nn.Module]] = []
    features, dropout = channels, config["dropout"]
    if config["head"] == "pool":
        layers += [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())]
        if dropout:
            layers.append(("dropout", nn.Dropout(dropout)))
    else:
        layers.append(("flatten", nn.Flatten()))
        features = channels * size[0] * size[1]
        hidden = config["fc_width"] or min(4096, features)
        for i in (1, 2):
            layers += [
                (f"fc{i}", nn.Linear(features, hidden)),
                (f"act{i}", _activation(config["activation"])),
            ]
            if dropout:
                layers.append((f"dropout{i}", nn.Dropout(dropout)))
            features = hidden
    layers.append(("out", nn.Linear(features, config["num_classes"])))
    return nn.Sequential(OrderedDict(layers))


def _groups(wanted: int, channels: int, pixels: int) -> int:
    """The most groups <= wanted that divide the channels; a value alone in its group would become 0."""
    fitting = [g for g in range(2, min(wanted, channels) + 1) if channels % g == 0]
    return max((g for g in fitting if channels // g * pixels > 1), default=1)


def _activation(name: str) -> nn.Module:
    # In place where the backward needs the output alone.
    return nn.ReLU(inplace=True) if name == "relu" else ACTIVATIONS[name]()


def _initialize(model: VGG) -> None:
    """He et al. 2015 for hidden layers, 1/sqrt(fan-in) for the last one, zero biases."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            if module is model.classifier.out:
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            else:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _whole(argument: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{argument} must be >= {least}, got {value}")
    return value


def _choice(argument: str, value: Any, choices: tuple[str, ...]) -> str:
    if argument == "norm" and value == "batch":
        raise ValueError(
            "norm must be 'group' or 'none', got 'batch': batch statistics mix samples, so that no "
            "per-sample gradient exists"
        )
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(choices)}, got {value!r}")
    return value


def _probability(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"dropout must be in [0, 1), got {value!r}")
    return float(value)


def _size(value: Any, least: int) -> int | list[int]:
    sides = [value] if isinstance(value, int) else list(value) if isinstance(value, Sequence) else []
    if len(sides) not in (1, 2) or isinstance(value, str):
        raise TypeError(f"image_size must be an int or (H, W), got {value!r}")
    for side in sides:
        _whole("image_size", side, least)
    return sides[0] if len(sides) == 1 or sides[0] == sides[1] else sides


def _plan(value: Any) -> list[int | str]:
    plan = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if not plan or plan[0] == "M" or any(step != "M" and type(step) is not int for step in plan):
        raise ValueError(f'plan must be channels and "M", beginning with channels, got {value!r}')
    for step in plan:
        if step != "M":
            _whole("plan", step, 1)
    return plan
