"""The moving average of a model's weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from adaclip.ranges import holds

__all__ = ["moving_average"]


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the model for the average of its weights, which forgets the random start.

    Call `update_parameters(model)` once after every `optimizer.step()` that released something. The n-th update
    (from 0) uses decay min(decay, (1 + n) / (10 + n)).

    Privacy: none is spent. The average is a function of parameters that were released.

    Raises:
        ValueError, TypeError: decay is not in [0, 1), or model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not holds(decay, lambda v: 0 <= v < 1):
        raise ValueError(f"decay must be in [0, 1), got {decay!r}")

    def update(averaged: Any, current: Any, count: Tensor) -> None:
        n = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, count)

    return AveragedModel(model, multi_avg_fn=update)
