"""How well a model does on images that it is not trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adaclip.interrupts import Interrupts

__all__ = ["Interrupted", "evaluate"]

_EVALUATION_BATCH = 500


class Interrupted(Exception):
    """An evaluation was left because of a signal."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    normalize: Any,
    interrupts: Interrupts | None = None,
) -> tuple[float, float]:
    """(accuracy, mean cross-entropy) of `model`, in evaluation mode; its mode is restored.

    images: uint8 [N, C, H, W]; labels: int64 [N], both anywhere; normalize: what `ImageData.normalize` is.
    """
    was_training = model.training
    model.eval()
    device = next((p.device for p in model.parameters()), images.device)
    correct, loss = torch.zeros((), device=device), torch.zeros((), device=device)
    try:
        for x, y in zip(images.split(_EVALUATION_BATCH), labels.split(_EVALUATION_BATCH), strict=True):
            if interrupts is not None and interrupts.requested:
                raise Interrupted
            x, y = x.to(device), y.to(device)
            logits = model(normalize(x))
            correct += (logits.argmax(1) == y).sum()
            loss += cross_entropy(logits, y, reduction="sum")
    finally:
        model.train(was_training)
    return float(correct) / len(labels), float(loss) / len(labels)
