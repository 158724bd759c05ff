"""What a training run writes down of itself: its settings, a row for each evaluation, a summary. Public numbers only."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

import adaclip

if TYPE_CHECKING:
    from adaclip.train import Training

__all__ = ["evaluation_row", "run_settings", "step_settings", "summary"]


def run_settings(training: Training) -> dict[str, dict[str, Any]]:
    """The arguments of `RunFolder.write_config`: settings, what follows from them, versions."""
    config, optimizer, data = training.config, training.optimizer, training.data
    return {
        "train": dataclasses.asdict(config),
        "run": {
            "dataset_size": training.size,
            "evaluated_on": {"split": training.split, "size": len(data.test_labels)},
            "duplicates_removed": data.duplicates_removed,
            "classes": data.classes,
            "image_shape": list(data.train_images.shape[1:]),
            "steps": training.total,
            "expected_batch_size": training.loader.expected_batch_size,
            "sample_rate": training.sample_rate,
            "noise_multiplier": optimizer.base_noise_multiplier,
            "gradient_noise_multiplier": optimizer.gradient_noise_multiplier,
            "max_grad_norm": optimizer.max_grad_norm,
            "clipping": optimizer.clipping.config(),
            "groups": None if training.groups is None else training.groups.config(),
            "learning_rate": config.learning_rate,
            "trained_parameters": sum(p.numel() for p in optimizer.trained()),
            "device": str(training.device),
            "precision": training.place.precision,
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "adaclip": adaclip.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def step_settings(training: Training) -> dict[str, Any]:
    """What the last step was made with, and released beside the update: plain values."""
    optimizer, groups = training.optimizer, training.groups
    row: dict[str, Any] = {
        "lr": optimizer.param_groups[0]["lr"],
        "max_grad_norm": float(optimizer.used_thresholds.square().sum().sqrt()),
        "noise_multiplier": optimizer.noise_multiplier,
        "gradient_noise_multiplier": optimizer.gradient_noise_multiplier,
    }
    if groups is not None and groups.released:
        released = groups.released
        row |= {"selected_group": released["selected"], "group_ratios": released["ratios"].tolist()}
    return row


def evaluation_row(training: Training, accuracy: float, loss: float) -> dict[str, Any]:
    """A row of metrics.jsonl: the step that is done, what the evaluation gave, and what has been spent."""
    return {
        "step": training.step,
        "epoch": training.step * training.sample_rate,
        f"{training.split}_accuracy": accuracy,
        f"{training.split}_loss": loss,
        "epsilon": training.epsilon(),
        "delta": training.config.delta,
        **training.last,
        "seconds": training.seconds,
        "images_per_second": training.rate(),
    }


def summary(training: Training, row: Mapping[str, Any]) -> dict[str, Any]:
    """What the command prints at the end, from the last row of metrics.jsonl."""
    return {
        f"{training.split}_accuracy": row[f"{training.split}_accuracy"],
        "epsilon": float(row["epsilon"]),  # "inf" in the file: JSON has no infinity
        "delta": row["delta"],
        "images_per_second": row["images_per_second"],
        "seconds": row["seconds"],
        "run_folder": str(training.folder.path),
    }
