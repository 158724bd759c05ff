"""Per-layer clipping: a norm for every layer, fixed or following a quantile of that layer's norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaclip.clipping.base import Clipping, Setting, check_norm
from adaclip.clipping.quantile import QuantileThresholds, check_fraction

__all__ = ["PerLayerClipping"]

_ALLOCATIONS = ("threshold", "equal")


class PerLayerClipping(Clipping):
    """A norm C_k for every layer k (McMahan et al. 2018, arXiv 1710.06963).

    Releases K noisy clipped sums, to which one example adds at most C_k in norm. With std_k = sigma_g g_k
    sqrt(sum_j C_j^2/g_j^2) they are one Gaussian mechanism of noise multiplier sigma_g, since sum_k
    (C_k/std_k)^2 = 1/sigma_g^2, whatever the positive g are.

    With a `quantile`, each C_k follows that quantile of its own layer's norms, as `AdaptiveClipping` does for
    all of them (Andrew et al. 2021, arXiv 1905.03871): a step also releases K centered indicators, to which an
    example adds a vector of norm sqrt(K)/2, so sigma_g = (sigma^-2 - K/(2 sigma_b)^2)^(-1/2). Without one
    nothing is released beside the sums, and sigma_g = sigma.

    A sample with a non-finite gradient in one layer contributes to none.

    Args:
        max_grad_norm: one number C, shared equally (C_k = C/sqrt(K), so that a sample's whole gradient is
          clipped to C), or a sequence of K numbers in the order of the model's layers. C_0 with a quantile.
        per_parameter: the K norms are of the trained parameters, in the optimizer's order, not of the layers:
          weight and bias of a layer are clipped apart.
        allocation: "threshold", g_k = C_k: std_k = sigma_g C_k sqrt(K), each layer has the same signal-to-noise
          ratio at its threshold. "equal", g_k = 1: the same noise, sigma_g sqrt(sum_j C_j^2), in every layer.
        quantile: the share of norms that shall be below each C_k, in (0, 1); None: thresholds stay.
        rate, accelerate: of the thresholds' update, as in `AdaptiveClipping`.
        sigma_b: noise standard deviation on each indicator sum; None: sqrt(K) q N / 20.

    Raises:
        ValueError: an argument is wrong.
    """

    def __init__(
        self,
        max_grad_norm: float | Sequence[float] = 1.0,
        allocation: str = "threshold",
        quantile: float | None = None,
        rate: float = 0.2,
        sigma_b: float | None = None,
        accelerate: bool = True,
        per_parameter: bool = False,
    ):
        self.per_parameter = bool(per_parameter)
        self._shared = isinstance(max_grad_norm, (int, float))
        norms = [max_grad_norm] if self._shared else list(max_grad_norm)
        name = "max_grad_norm" if self._shared else "max_grad_norm[k]"
        self._initial = [check_norm(c, name) for c in norms]
        if not self._initial:
            raise ValueError("max_grad_norm must hold a norm for each layer, got none")
        if allocation not in _ALLOCATIONS:
            raise ValueError(f"allocation must be one of {_ALLOCATIONS}, got {allocation!r}")
        self._allocation = allocation
        self.quantile = None if quantile is None else check_fraction(quantile, "quantile")
        if quantile is None and sigma_b is not None:
            raise ValueError(f"sigma_b must be None without a quantile, got {sigma_b!r}")
        self.rate = check_norm(rate, "rate")
        self.sigma_b = None if sigma_b is None else check_norm(sigma_b, "sigma_b")
        self.accelerate = bool(accelerate)
        self.thresholds = torch.tensor(self._initial, dtype=torch.float64)

    @property
    def name(self) -> str:
        return "per_layer" if self.quantile is None else "per_layer_adaptive"

    def bind(self, setting: Setting) -> int:
        layers = setting.layers
        if self._shared:
            norms = [self._initial[0] / math.sqrt(layers)] * layers
        elif len(self._initial) != layers:
            of = "trained parameters" if self.per_parameter else "layers with trainable parameters"
            raise ValueError(
                f"max_grad_norm must hold one norm for each of the {layers} {of}, got {len(self._initial)}"
            )
        else:
            norms = self._initial
        self.thresholds = torch.tensor(norms, dtype=torch.float64, device=setting.device)
        if self.quantile is not None:
            self.side: QuantileThresholds | None = QuantileThresholds(
                self.thresholds,
                expected_batch_size=setting.expected_batch_size,
                quantile=self.quantile,
                rate=self.rate,
                sigma_b=self.sigma_b,
                accelerate=self.accelerate,
                backend=setting.backend,
            )
            self.sigma_b = self.side.sigma_b
        return layers

    def noise_scale(self) -> Tensor:
        """float64 [K]: g_k sqrt(sum_j C_j^2/g_j^2)."""
        if self._allocation == "threshold":
            return self.thresholds * math.sqrt(self.thresholds.numel())
        return torch.linalg.vector_norm(self.thresholds).expand_as(self.thresholds)

    @property
    def history(self) -> Tensor:
        """float64 [releases + 1, K]: C_0, C_1, … up to the thresholds in force; [1, K] where they stay."""
        return self.thresholds[None].clone() if self.side is None else self.side.history

    def config(self) -> dict[str, Any]:
        following = {"rate": self.rate, "sigma_b": self.sigma_b, "accelerate": self.accelerate}
        return {
            "name": self.name,
            "max_grad_norm": self._initial[0] if self._shared else self._initial,
            "allocation": self._allocation,
            "quantile": self.quantile,
            **({} if self.quantile is None else following),
            **({"per_parameter": True} if self.per_parameter else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() if self.side is None else self.side.state_dict()

    def check_state(self, state: dict[str, Any]) -> None:
        if self.side is None:
            super().check_state(state)
        else:
            self.side.check_state(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.side is None:
            super().load_state_dict(state)
        else:
            self.side.load_state_dict(state)
