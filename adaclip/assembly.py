"""From settings to objects: data, model, optimizer, learning rate, clipping and what else a step does."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from adaclip import data, models
from adaclip.clipping import (
    AdaptiveClipping,
    AutomaticClipping,
    Clipping,
    DCSGDClipping,
    FlatClipping,
    PerLayerClipping,
    PSACClipping,
)
from adaclip.data import ImageData
from adaclip.groups import LabelGroups
from adaclip.launch import local_rank, process_count
from adaclip.planning import quantized
from adaclip.schedules import Cosine, Exponential, Linear, Schedule
from adaclip.smoothing import DiSK, DPAdamBC, NoiseCorrectedNadam, SmoothedLoss
from adaclip.train_config import TrainConfig, schedule_parts

__all__ = [
    "build_clipping",
    "build_model",
    "build_optimizer",
    "learning_rate",
    "load_data",
    "pick_device",
    "privacy_options",
]

_OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "noise-nadam": NoiseCorrectedNadam,
    "adambc": DPAdamBC,
    "disk": DiSK,
}
# What `floor` is called by the optimizers that have one.
_FLOORS = {"noise-nadam": "floor", "adambc": "gamma"}
_SCHEDULES = {"linear": Linear, "exponential": Exponential, "cosine": Cosine}


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate of logical step `step` (from 0) of `total`: a public function of the settings."""
    rate = config.learning_rate
    if step < config.warmup:
        return rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, total - config.warmup)
    if config.lr_schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * done))
    return rate * (1 - done) if config.lr_schedule == "linear" else rate


def pick_device(name: str) -> torch.device:
    """The device named; "auto" is a GPU if there is one, and each of several processes gets its own.

    Raises ValueError where there is none.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no CUDA GPU here (see `adaclip doctor`)")
    if process_count() == 1:
        return torch.device("cuda")
    if local_rank() >= torch.cuda.device_count():
        raise ValueError(
            f"torchrun must start at most {torch.cuda.device_count()} processes here, one for each GPU, got number "
            f"{local_rank()} (from 0)"
        )
    device = torch.device("cuda", local_rank())
    torch.cuda.set_device(device)
    return device


def load_data(config: TrainConfig) -> ImageData:
    """The data set; with `validation`, a held-out part of the training images stands in for the test set."""
    loaded = data.load(config.dataset, config.data_dir, config.download, image_size=config.image_size)
    # One split for all seeds: settings tuned on it are compared on the same images.
    return loaded.holdout(config.validation) if config.validation else loaded


def build_model(config: TrainConfig, images: ImageData, device: torch.device) -> nn.Module:
    """The model, on `device`, with weights from torch's global generator. Raises ValueError for a wrong option."""
    if config.model not in models.NAMES:
        raise ValueError(f"model must be one of {', '.join(models.NAMES)}, got {config.model!r}")
    try:
        model = models.build(
            config.model,
            num_classes=images.num_classes,
            in_channels=images.in_channels,
            image_size=images.image_size,
            **config.model_option,
        )
    except TypeError as error:
        raise ValueError(f"model_option does not fit {config.model}: {error}") from error
    return model.to(device)


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The torch optimizer of the settings over all parameters."""
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        options["momentum"] = config.momentum
    if config.optimizer == "disk":
        options["kappa"] = config.filter_gain
    if config.optimizer in _FLOORS and config.floor is not None:
        options[_FLOORS[config.optimizer]] = config.floor
    return _OPTIMIZERS[config.optimizer](model.parameters(), **options)


def build_clipping(config: TrainConfig, total: int) -> Clipping:
    """The clipping strategy of the settings, for a run of `total` steps."""
    norm = config.max_grad_norm
    quantile = {"quantile": config.quantile, "rate": config.clip_rate, "sigma_b": config.quantile_noise}
    if config.clipping == "flat":
        return FlatClipping(norm, schedule=_schedule("norm_schedule", config.norm_schedule, total))
    if config.clipping == "per_layer":
        return PerLayerClipping(norm)
    if config.clipping == "per_layer_adaptive":
        return PerLayerClipping(norm, **quantile)
    if config.clipping == "adaptive":
        return AdaptiveClipping(norm, **quantile)
    if config.clipping == "automatic":
        return AutomaticClipping(norm)
    if config.clipping == "psac":
        return PSACClipping(norm)
    criterion = "error" if config.clipping == "dc_sgd_error" else "percentile"
    return DCSGDClipping(norm, criterion=criterion, percentile=config.quantile, sigma_h=config.quantile_noise)


def _schedule(name: str, text: str, total: int) -> Schedule | None:
    parts = schedule_parts(name, text)
    return None if parts is None else _SCHEDULES[parts[0]](1.0, parts[1], total)


def privacy_options(
    config: TrainConfig, images: ImageData, total: int, diagnostics: bool = False
) -> dict[str, Any]:
    """The arguments of `PrivacyEngine.make_private` that say what a step releases, and where gradients are taken.

    total: steps of the run; diagnostics: keep private statistics of the label groups for whoever may see the data.
    """
    noise = _schedule("noise_schedule", config.noise_schedule, total)
    options: dict[str, Any] = {
        "clipping": build_clipping(config, total),
        # As the engine plans it: a resumed run has no plan of its own to make, and must book the same values.
        "noise_schedule": None if noise is None else quantized(noise, total),
        "views_per_sample": config.views,
        "augmentation": config.augment,
    }
    if config.groups != "off":
        options["groups"] = LabelGroups(
            config.groups,
            groups=images.num_classes,
            sigma_s=config.group_noise,
            sigma_n=config.count_noise,
            diagnostics=diagnostics,
        )
    if config.smoothing:
        options["smoothing"] = SmoothedLoss(config.smoothing, signal=config.smoothing_signal)
    return options
