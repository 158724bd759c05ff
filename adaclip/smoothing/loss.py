"""The smoothed loss: how far the weights are moved at random before gradients are taken, and when."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from adaclip.ranges import holds
from adaclip.smoothing.disk import DiSK
from adaclip.smoothing.nadam import NoiseCorrectedNadam

__all__ = ["NoiseSignal", "SmoothedLoss"]

_ADAM_LIKE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, NoiseCorrectedNadam)


@dataclass(frozen=True)
class SmoothedLoss:
    """Settings of the smoothed loss E_z[loss(theta + tau_t scale z)], z ~ N(0, I).

    One draw of z serves a whole step, so per-sample gradients are taken at one point, theta + tau_t scale z, and
    then clipped as always. `scale` is, for each parameter tensor, the root mean square of its elements when training
    began (so tau is relative, and a tensor that starts at zero is left alone).

    tau_t is tau or 0, by a condition on what was released before step t:

        "always": tau.
        "snr": tau while the momentum's signal-to-noise ratio is below `threshold`. With m the optimizer's
            momentum (released) and V the variance that the noise alone gives it (public, exact for each of the
            supported optimizers), the ratio is |m|^2 / E|noise part of m|^2 - 1.
        "plateau": tau while that ratio is below `threshold` times its own highest value so far.

    Privacy: none is spent. z is independent of the data, tau_t is a function of released values, and every step
    clips its per-sample gradients wherever they are taken: the sum has the sensitivity it always has.

    Args:
        tau: at least 0; 0 leaves everything as it is.
        signal: "always", "snr" or "plateau".
        threshold: above 0.
        every: steps between two looks at the momentum, at least 1. Before the first look, tau_t is 0.
        decay: of the ratio's moving average over the looks, in [0, 1).
        refresh: steps that one draw of z serves, at least 1, with alternating sign: every z is N(0, I), neighbors
            are antithetic (which cancels the first-order effect of the perturbation over two steps), and the
            draws cost 1 / refresh as much. 1 draws for every step.

    Raises:
        ValueError, TypeError: an argument out of its range.
    """

    tau: float = 0.01
    signal: str = "snr"
    threshold: float = 0.5
    every: int = 10
    decay: float = 0.5
    refresh: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.signal, str) or self.signal not in ("always", "snr", "plateau"):
            raise ValueError(f"signal must be 'always', 'snr' or 'plateau', got {self.signal!r}")
        for name in ("every", "refresh"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not holds(self.tau, lambda v: 0 <= v < math.inf):
            raise ValueError(f"tau must be finite and at least 0, got {self.tau!r}")
        if not holds(self.threshold, lambda v: 0 < v < math.inf):
            raise ValueError(f"threshold must be finite and above 0, got {self.threshold!r}")
        if not holds(self.decay, lambda v: 0 <= v < 1):
            raise ValueError(f"decay must be in [0, 1), got {self.decay!r}")

    def config(self) -> dict[str, Any]:
        """The settings as plain values."""
        return asdict(self)


class NoiseSignal:
    """The signal-to-noise ratio of an optimizer's momentum, and the condition on it.

    Args:
        smoothing: the settings.
        optimizer: with a momentum of known coefficients if the condition needs one: SGD with momentum, Adam, AdamW,
            NAdam, or those of adaclip.smoothing.

    Raises:
        ValueError: the condition needs a momentum that the optimizer does not have.

    On an accelerator, a look (one in `every` steps) reads one number back; other steps read nothing.
    """

    def __init__(self, smoothing: SmoothedLoss, optimizer: torch.optim.Optimizer):
        self.smoothing = smoothing
        self._optimizer = optimizer
        self._steps = 0
        self._average: float | None = None
        self._best = -math.inf
        # Variance of the noise in each element of a parameter's momentum; 0-dimensional where stds are on a device.
        self._variance: dict[Tensor, float | Tensor] = {}
        if smoothing.signal != "always":
            for group in optimizer.param_groups:
                self._coefficients(group)

    @property
    def ratio(self) -> float | None:
        """The averaged signal-to-noise ratio; None before the first look."""
        return self._average

    @property
    def tau(self) -> float:
        """tau_t of the next step."""
        settings = self.smoothing
        if settings.signal == "always":
            return settings.tau
        limit = settings.threshold if settings.signal == "snr" else settings.threshold * self._best
        return settings.tau if self._average is not None and self._average < limit else 0.0

    def observe(self, params: Iterable[Tensor], stds: Iterable[float] | Tensor) -> None:
        """Count one update, whose gradients held noise of standard deviations `stds`."""
        if self.smoothing.signal == "always":
            return
        groups = {p: group for group in self._optimizer.param_groups for p in group["params"]}
        params = list(params)
        if isinstance(stds, Tensor) and stds.device.type == "cpu":
            stds = stds.tolist()
        for p, std in zip(params, stds, strict=True):
            decay, keep, first_keep = self._coefficients(groups[p])
            variance = self._variance.get(p)
            if variance is None:
                self._variance[p] = (first_keep * std) ** 2
            else:
                self._variance[p] = variance * decay**2 + (keep * std) ** 2
        self._steps += 1
        if self._steps % self.smoothing.every == 0:
            self._look(params)

    def _look(self, params: list[Tensor]) -> None:
        momenta = [(p, self._momentum(p)) for p in params]
        power = sum(torch.linalg.vector_norm(m).double() ** 2 for p, m in momenta if m is not None)
        noise = sum(p.numel() * self._variance[p] for p in params)
        # Without noise: infinite, or not a number if there is no momentum either; then nothing is smoothed.
        ratio = float(torch.as_tensor(power, dtype=torch.float64) / noise - 1) if params else math.nan
        if self._average is None or not math.isfinite(self._average):
            self._average = ratio
        else:
            self._average += (1 - self.smoothing.decay) * (ratio - self._average)
        self._best = max(self._best, self._average)

    def _momentum(self, p: Tensor) -> Tensor | None:
        state = self._optimizer.state.get(p, {})
        return state.get("exp_avg", state.get("momentum_buffer"))

    def _coefficients(self, group: dict[str, Any]) -> tuple[float, float, float]:
        """(decay, keep, keep of the first step) of the group's momentum."""
        optimizer = self._optimizer
        if isinstance(optimizer, _ADAM_LIKE):
            beta = group["betas"][0]
            return beta, 1 - beta, 1 - beta
        if isinstance(optimizer, DiSK):
            return 1 - group["kappa"], group["kappa"], 1.0
        if isinstance(optimizer, torch.optim.SGD) and group["momentum"] > 0:
            return group["momentum"], 1 - group["dampening"], 1.0
        raise ValueError(
            f"signal={self.smoothing.signal!r} needs an optimizer with momentum (SGD with momentum, Adam, AdamW, NAdam "
            f"or one of adaclip.smoothing), got {type(optimizer).__name__} without: use signal='always'"
        )

    def state_dict(self, params: Iterable[Tensor]) -> dict[str, Any]:
        return {
            "steps": self._steps,
            "average": self._average,
            "best": self._best,
            "variances": [self._variance.get(p) for p in params],
        }

    def load_state_dict(self, params: Iterable[Tensor], state: dict[str, Any]) -> None:
        self._steps, self._average, self._best = state["steps"], state["average"], state["best"]
        pairs = zip(params, state["variances"], strict=True)
        self._variance = {p: v for p, v in pairs if v is not None}
