"""From settings to objects: data, model, optimizer, learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from adaclip import data, models
from adaclip.data import ImageData
from adaclip.train_config import TrainConfig

__all__ = ["build_model", "build_optimizer", "learning_rate", "load_data", "pick_device"]

_OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
}


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
    """The device named; "auto" is a GPU if there is one. Raises ValueError where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no CUDA GPU here (see `adaclip doctor`)")
    return torch.device(
        "cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu")
    )


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
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        options["momentum"] = config.momentum
    return _OPTIMIZERS[config.optimizer](model.parameters(), **options)
