"""Per-layer clipping: a norm for every layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaclip.clipping.base import Clipping, Setting, check_norm

__all__ = ["PerLayerClipping"]

_ALLOCATIONS = ("threshold", "equal")


class PerLayerClipping(Clipping):
    """A norm C_k for every layer k (McMahan et al. 2018, arXiv 1710.06963).

    Releases K noisy clipped sums, to which one example adds at most C_k in norm. With std_k = sigma g_k
    sqrt(sum_j C_j^2/g_j^2) they are one Gaussian mechanism of noise multiplier sigma, since sum_k
    (C_k/std_k)^2 = 1/sigma^2, whatever the positive g are.

    A sample with a non-finite gradient in one layer contributes to none.

    Args:
        max_grad_norm: one number C, shared equally (C_k = C/sqrt(K), so that a sample's whole gradient is
          clipped to C), or a sequence of K numbers in the order of the model's layers.
        allocation: "threshold", g_k = C_k: std_k = sigma C_k sqrt(K), each layer has the same signal-to-noise
          ratio at its threshold. "equal", g_k = 1: the same noise, sigma sqrt(sum_j C_j^2), in every layer.

    Raises:
        ValueError: an argument is wrong.
    """

    name = "per_layer"

    def __init__(self, max_grad_norm: float | Sequence[float] = 1.0, allocation: str = "threshold"):
        self._shared = isinstance(max_grad_norm, (int, float))
        norms = [max_grad_norm] if self._shared else list(max_grad_norm)
        name = "max_grad_norm" if self._shared else "max_grad_norm[k]"
        self._initial = [check_norm(c, name) for c in norms]
        if not self._initial:
            raise ValueError("max_grad_norm must hold a norm for each layer, got none")
        if allocation not in _ALLOCATIONS:
            raise ValueError(f"allocation must be one of {_ALLOCATIONS}, got {allocation!r}")
        self._allocation = allocation
        self.thresholds = torch.tensor(self._initial, dtype=torch.float64)

    def bind(self, setting: Setting) -> int:
        layers = setting.layers
        if self._shared:
            norms = [self._initial[0] / math.sqrt(layers)] * layers
        elif len(self._initial) != layers:
            raise ValueError(
                f"max_grad_norm must hold one norm for each of the {layers} layers with trainable "
                f"parameters, got {len(self._initial)}"
            )
        else:
            norms = self._initial
        self.thresholds = torch.tensor(norms, dtype=torch.float64, device=setting.device)
        return layers

    def noise_scale(self) -> Tensor:
        """float64 [K]: g_k sqrt(sum_j C_j^2/g_j^2)."""
        if self._allocation == "threshold":
            return self.thresholds * math.sqrt(self.thresholds.numel())
        return torch.linalg.vector_norm(self.thresholds).expand_as(self.thresholds)

    def config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "max_grad_norm": self._initial[0] if self._shared else self._initial,
            "allocation": self._allocation,
        }
