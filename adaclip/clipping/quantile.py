"""Adaptive clipping: thresholds that follow a quantile of the norms, which is measured with noise."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from adaclip import ops
from adaclip.clipping.base import Clipping, Setting, SplitRelease, check_norm, check_tensors

__all__ = ["AdaptiveClipping", "QuantileThresholds", "check_fraction"]

# C_t stays within this factor of C_0, on either side: noise of any strength leaves it positive and finite.
_REACH = 1e6


def _check_bounds(bounds: tuple[float, float] | None, first: float) -> tuple[float, float] | None:
    """(low, high) as floats; ValueError unless low <= first <= high, low < high, within `_REACH` of first."""
    if bounds is None:
        return None
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ValueError(f"bounds must be None or two numbers, got {bounds!r}")
    low, high = (check_norm(c, "bounds") for c in bounds)
    if not low <= first <= high or low == high:
        raise ValueError(f"bounds must be low < high with max_grad_norm {first} between, got {bounds!r}")
    return low, high


def check_fraction(value: float, name: str) -> float:
    """`value` as a float; ValueError unless it is a number in (0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"{name} must be in (0, 1), got {value!r}")
    return float(value)


class QuantileThresholds(SplitRelease):
    """K thresholds, each moved towards the same quantile of its own group's norms: a side release.

    For every group k it releases sum_b (1[n_bk <= C_k] - 1/2) + N(0, sigma_b^2). An example adds +1/2 or -1/2
    to each of the K sums, so a vector of norm sqrt(K)/2; it costs K/(2 sigma_b)^2 of the step's sigma^-2.
    Without the 1/2 it would cost four times as much. See `AdaptiveClipping` for the update.

    Args:
        thresholds: float64 [K], C_0. Kept, and changed in place.
        expected_batch_size: q N, what the noisy sum is divided by: public, never the realized batch size.
        quantile, rate, accelerate: as in `AdaptiveClipping`.
        sigma_b: noise on each indicator sum; None: sqrt(K) q N / 20.
        bounds: (lowest, highest) value of every threshold; None, or beyond that: a factor 1e6 around C_0.
        backend: what moves the thresholds (`adaclip.backends`).
    """

    def __init__(
        self,
        thresholds: Tensor,
        *,
        expected_batch_size: float,
        quantile: float = 0.5,
        rate: float = 0.2,
        sigma_b: float | None = None,
        accelerate: bool = True,
        bounds: tuple[float, float] | None = None,
        backend: str = "auto",
    ):
        self._backend = backend
        self.quantile = check_fraction(quantile, "quantile")
        self.rate = check_norm(rate, "rate")
        self.accelerate = bool(accelerate)
        self.width = thresholds.numel()
        self._denominator = check_norm(expected_batch_size, "expected_batch_size")
        default = math.sqrt(self.width) * self._denominator / 20
        self.sigma_b = default if sigma_b is None else check_norm(sigma_b, "sigma_b")
        self._thresholds = thresholds
        self._low, self._high = thresholds / _REACH, thresholds * _REACH
        if bounds is not None:
            self._low, self._high = self._low.clamp_min(bounds[0]), self._high.clamp_max(bounds[1])
        self._run = torch.zeros_like(thresholds)
        # Row i is C_i, for those that are no longer in force. On the device, grown by doubling: nothing is read back
        # in a step.
        self._history = thresholds.new_empty(64, self.width)
        self._steps = 0

    @property
    def sensitivities(self) -> tuple[tuple[float, float], ...]:
        return ((math.sqrt(self.width) / 2, self.sigma_b),)

    @property
    def history(self) -> Tensor:
        """float64 [releases + 1, K]: C_0, C_1, … up to the C in force. Released values, safe to publish."""
        return torch.cat([self._history[: self._steps], self._thresholds[None]])

    def stds(self) -> list[float]:
        return [self.sigma_b] * self.width

    def outputs(self, sums: Tensor) -> dict[str, Tensor]:
        return {"below": sums}

    def prepare(self, t: int) -> None:
        if self._steps == len(self._history):
            self._history = torch.cat([self._history, torch.empty_like(self._history)])
        self._history[self._steps] = self._thresholds
        self._steps += 1

    def take_in(self, released: Tensor) -> None:
        ops.follow_quantile(
            self._thresholds,
            self._run,
            released,
            low=self._low,
            high=self._high,
            denominator=self._denominator,
            quantile=self.quantile,
            rate=self.rate,
            accelerate=self.accelerate,
            backend=self._backend,
        )

    def config(self) -> dict[str, Any]:
        return {
            "quantile": self.quantile,
            "rate": self.rate,
            "sigma_b": self.sigma_b,
            "accelerate": self.accelerate,
        }

    def state_dict(self) -> dict[str, Any]:
        """The thresholds in force, the runs of saturated steps and the history."""
        return {"thresholds": self._thresholds.clone(), "run": self._run.clone(), "history": self.history}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError, with nothing changed, unless `state` can be loaded."""
        ours = self.state_dict()
        if isinstance(state, dict) and isinstance(state.get("history"), Tensor) and len(state["history"]):
            ours["history"] = ours["history"][:1].expand(len(state["history"]), -1)
        check_tensors(state, ours, "clipping state")
        for name in ("thresholds", "history"):
            saved = state[name].to(self._low.device)
            if not bool(((saved >= self._low) & (saved <= self._high)).all()):
                raise ValueError(
                    f"clipping state {name} must be within the bounds of {self._low.min().item():g} and "
                    f"{self._high.max().item():g}, got {saved.min().item():g} to {saved.max().item():g}"
                )
        if not bool(state["run"].isfinite().all()):
            raise ValueError(f"clipping state run must be finite, got {state['run'].tolist()}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, which `check_state` has passed."""
        self._thresholds.copy_(state["thresholds"])
        self._run.copy_(state["run"])
        self._steps = len(state["history"]) - 1
        rows = 64 << max(0, (self._steps // 64).bit_length())
        self._history = self._history.new_empty(rows, self.width)
        self._history[: self._steps + 1] = state["history"].to(self._history.device)


class AdaptiveClipping(Clipping):
    """A threshold that follows a quantile of the per-sample norms (Andrew et al. 2021, arXiv 1905.03871).

    Releases, beside the clipped sum (an example adds at most C_t to it), how many norms are below C_t, by the
    centered indicator: b_t = 1/2 + (sum_b (1[|g_b| <= C_t] - 1/2) + N(0, sigma_b^2)) / (q N). An example adds
    1/2 to this sum, so of the step's noise multiplier sigma the gradient keeps
    sigma_g = (sigma^-2 - (2 sigma_b)^-2)^(-1/2), and its noise has the standard deviation sigma_g C_t. A sigma_b
    of no more than sigma/2 leaves nothing and is refused before training. The denominator is public: the
    realized batch size enters nowhere.

    Then C_{t+1} = C_t exp(-rate f (b_t - quantile)). f = 1 is the paper's. From far away every step is saturated
    (all norms are on one side), and C moves by at most rate max(quantile, 1 - quantile) in its logarithm: with
    `accelerate` f doubles with every saturated step after the second, up to 8, and falls back to 1 with the
    first that is not. A function of released numbers, it costs no privacy.

    What a step measures takes effect in the next one: C_{t+1} is a function of released values alone, so the
    steps compose adaptively. Where an example is replaced, not added or removed, the same sigma covers it (the
    ledger's law is for any two contributions of norm 1/2).

    In floating point: under a mean loss autograd divides by the rows of the physical batch, so who else is in it
    can change a norm in its last float32 digit, and flip the indicator of an example whose norm is within 1e-7
    of C_t. Where that matters (many copies of one example), `pad_to` or a summed loss makes the divisor public.

    Args:
        max_grad_norm: C_0. C_t stays within a factor 1e6 of it.
        quantile: the share of norms that shall be below C, in (0, 1).
        rate: eta > 0.
        sigma_b: noise standard deviation on the indicator sum; None: q N / 20.
        accelerate: see above.
        bounds: (lowest, highest) value of C_t, public numbers around C_0; None: only the factor 1e6.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "adaptive"

    def __init__(
        self,
        max_grad_norm: float = 1.0,
        quantile: float = 0.5,
        rate: float = 0.2,
        sigma_b: float | None = None,
        accelerate: bool = True,
        bounds: tuple[float, float] | None = None,
    ):
        self._initial = check_norm(max_grad_norm)
        self.quantile = check_fraction(quantile, "quantile")
        self.rate = check_norm(rate, "rate")
        self.sigma_b = None if sigma_b is None else check_norm(sigma_b, "sigma_b")
        self.accelerate = bool(accelerate)
        self._bounds = _check_bounds(bounds, self._initial)
        self.thresholds = torch.tensor([self._initial], dtype=torch.float64)

    def bind(self, setting: Setting) -> int:
        self.thresholds = torch.tensor([self._initial], dtype=torch.float64, device=setting.device)
        self.side: QuantileThresholds = QuantileThresholds(
            self.thresholds,
            expected_batch_size=setting.expected_batch_size,
            quantile=self.quantile,
            rate=self.rate,
            sigma_b=self.sigma_b,
            accelerate=self.accelerate,
            bounds=self._bounds,
            backend=setting.backend,
        )
        self.sigma_b = self.side.sigma_b
        return 1

    @property
    def history(self) -> Tensor:
        """float64 [releases + 1]: C_0, C_1, … up to the C in force."""
        return self.side.history[:, 0]

    def config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "max_grad_norm": self._initial,
            "quantile": self.quantile,
            "rate": self.rate,
            "sigma_b": self.sigma_b,
            "accelerate": self.accelerate,
            **({} if self._bounds is None else {"bounds": list(self._bounds)}),
        }

    def state_dict(self) -> dict[str, Any]:
        return self.side.state_dict()

    def check_state(self, state: dict[str, Any]) -> None:
        self.side.check_state(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.side.load_state_dict(state)
