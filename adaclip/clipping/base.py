"""What every clipping strategy is to the engine: a rule, thresholds, the noise they need, and state."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from adaclip.ranges import MAX_FLOAT
from adaclip.reference import SLACK

__all__ = [
    "NORM_KEY",
    "SLACK",
    "Clipping",
    "Rule",
    "Setting",
    "SideRelease",
    "SplitRelease",
    "check_norm",
    "clip_factors",
]


# The key of a parameter group that holds its own clipping norm.
NORM_KEY = "max_grad_norm"


def clip_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    """`min(1, C / |g_b|)` in float64; 0 for a norm that is not finite.

    norms: float64 [...], upper bounds on the per-sample norms. A sample whose gradient is nan or inf
    contributes nothing (algorithms of DP-SGD need a bounded contribution, not a finite one). TypeError or ValueError
    for anything but floating norms and a positive finite C.
    """
    if not isinstance(norms, Tensor) or not norms.is_floating_point():
        got = norms.dtype if isinstance(norms, Tensor) else type(norms).__name__
        raise TypeError(f"norms must be a floating tensor, got {got}")
    max_grad_norm = check_norm(max_grad_norm)
    factors = (max_grad_norm * SLACK / norms).clamp_max(1.0)
    # A negative number is no norm, and a negative factor would bound nothing.
    return torch.where(norms.isfinite() & (norms >= 0), factors, torch.zeros_like(factors))


def check_norm(value: float, name: str = "max_grad_norm") -> float:
    """`value` as a float; ValueError unless it is a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_FLOAT:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return float(value)


@dataclass(frozen=True)
class Setting:
    """What a strategy is told, once, before training. Everything in it is public.

    Attributes:
        layers: number of layers with trained parameters, in the model's order; for strategies with
          `per_parameter` every trained parameter is a layer of its own, in the optimizer's order.
        parameters: how many trained numbers each of them holds.
        expected_batch_size: q N, the public denominator.
        device: of the norms that strategies will see, and where their state shall be.
        backend: what the run's operations are computed by (`adaclip.backends`).
        param_groups: called for the optimizer's parameter groups as they are now; None where there is no optimizer.
    """

    layers: int
    parameters: tuple[int, ...]
    expected_batch_size: float
    device: torch.device
    backend: str = "auto"
    param_groups: Callable[[], list[dict[str, Any]]] | None = None


class Rule(NamedTuple):
    """How a norm n and a threshold C become a factor (`adaclip.ops.clip_factors`).

    kind: "threshold" min(1, C/n); "normalized" C/(n + s); "psac" C/(n + s/(n + s)).
    stability: s, for the kinds that have one.

    With each of them n times the factor is at most C, also where n is only an upper bound on the norm.
    """

    kind: str
    stability: float = 0.0


@runtime_checkable
class SideRelease(Protocol):
    """A noisy sum that a step releases beside the gradient, over the same Poisson batch.

    Everything a step releases is one vector: the gradient's clipped sum and the sums of all side
    releases. `adaclip.step_release` adds the noise and says what is left of the noise multiplier for the
    gradient.

    Attributes:
        width: number S of float64 entries of the sum.
        sensitivities: (largest norm of what one example adds, noise standard deviation) for each of its
          independent parts. A norm of contributions, not of differences: the ledger's law for replacing one
          example covers any two contributions of that norm.
    """

    width: int
    sensitivities: tuple[tuple[float, float], ...]

    def stds(self) -> list[float]:
        """The noise standard deviation of each of the S entries, in the order of the sum."""

    def outputs(self, sums: Tensor) -> dict[str, Tensor]:
        """Keyword arguments for `adaclip.ops.sample_statistics`, which adds a micro-batch to the sum.

        sums: float64 [S], this release's part of the step's running sums; the tensors returned that are
        added to are views of it.
        """

    def absorb(self, released: Tensor, t: int) -> None:
        """Take in the noisy sum, float64 [S], of release t. In place, and without reading the device.

        What it changes applies from release t + 1 on.
        """


class SplitRelease(ABC):
    """A side release whose `absorb` comes apart, so that the device's part can be captured and replayed."""

    def absorb(self, released: Tensor, t: int) -> None:
        self.prepare(t)
        self.take_in(released)

    @abstractmethod
    def prepare(self, t: int) -> None:
        """The host's part of release t: it counts, and moves what it counts to where `take_in` reads it.

        Comes before everything that the device does for that release, and waits for nothing.
        """

    @abstractmethod
    def take_in(self, released: Tensor) -> None:
        """The device's part: operations on tensors that stay where they are, the same ones for every release."""


class Clipping(ABC):
    """How per-sample gradients are bounded, in K groups: one for all parameters, or one for each layer or each
    parameter group of the optimizer.

    In a step t, sample b of norms n_bk enters group k with the factor that `rule` gives for n_bk and
    `thresholds[k]`, so that it adds at most C_k to it. The noise on group k has the standard deviation
    `noise_scale()[k]` times the gradient's noise multiplier, and for all groups together that is one
    Gaussian mechanism of this multiplier.

    Thresholds of a step are a function of public numbers and of what earlier steps released; they may not
    move between a step's first backward and its noise. Subclasses change them in place, in `begin` and in
    their side release's `absorb` only.

    Attributes:
        name: the strategy's short name.
        rule: how norms become factors.
        thresholds: float64 [K], C_t of the logical batch in hand; K = 1 until `bind` knows the layers.
        side: what the strategy releases beside the gradient; None: nothing.
        per_parameter: whether weight and bias of a layer are told apart, as two layers would be.
    """

    name: str
    per_parameter: bool = False
    rule: Rule = Rule("threshold")
    thresholds: Tensor
    side: SideRelease | None = None

    @abstractmethod
    def bind(self, setting: Setting) -> int:
        """Get ready for a model; returns the number K of groups: 1, `setting.layers`, or any if `group_of` knows them.

        Called once, before anything is changed. Raises ValueError where the strategy does not fit.
        """

    def group_of(self, parameter: nn.Parameter) -> int | None:
        """The group of a trained parameter, from `begin` to the noise; None: the one that its layer is.

        RuntimeError for a parameter that was not there when the logical batch began.
        """
        return None

    def check_groups(self, groups: list[dict[str, Any]], defaults: dict[str, Any]) -> None:
        """ValueError unless an optimizer of these defaults may have these parameter groups."""
        if NORM_KEY not in defaults and any(NORM_KEY in group for group in groups):
            raise ValueError(
                f"{NORM_KEY!r} must not be in a parameter group that comes later: this run clips all groups by "
                f"{self.name!r}. Give every group its own norm before make_private"
            )

    def begin(self, t: int) -> None:  # noqa: B027 - most thresholds are no function of t
        """Release number t is about to be made: set C_t, where it is a function of t.

        Called before the first backward of a logical batch and, again, before its noise if there was no
        backward; more often for the same t if a logical batch is abandoned.
        """

    def agreed(self) -> int:
        """What stands for the thresholds in force: the same in all processes, below 2^63. 0 on an accelerator, which is
        not read for it: processes that start alike and take in the same releases have the same ones.
        """
        thresholds = self.thresholds
        return 0 if thresholds.device.type != "cpu" else zlib.crc32(thresholds.numpy().tobytes())

    def note_noise(self, noise_multiplier: float) -> None:  # noqa: B027
        """The gradient's share sigma_g of the noise multiplier is this from now on. Public; most need it not."""

    def noise_scale(self) -> Tensor:
        """float64 [K]: each group's noise standard deviation for a noise multiplier of 1.

        One group: C. K groups: s_k with sum_k (C_k/s_k)^2 = 1.
        """
        return self.thresholds

    @property
    def max_grad_norm(self) -> float:
        """The norm of a sample's whole clipped gradient, sqrt(sum_k C_k^2). Reads the device: for logs."""
        return math.hypot(*self.thresholds.tolist())

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What identifies the strategy: plain JSON values. A checkpoint's must be equal."""

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step: tensors and plain values. No private number is among them."""
        return {"thresholds": self.thresholds.clone()}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError, with nothing changed, unless `state` can be loaded."""
        check_tensors(state, self.state_dict(), "clipping state")
        saved = state["thresholds"]
        if not bool((saved.isfinite() & (saved > 0)).all()):
            raise ValueError(f"clipping state thresholds must be positive and finite, got {saved.tolist()}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, which `check_state` has passed."""
        self.thresholds.copy_(state["thresholds"])


def check_tensors(state: object, ours: dict[str, Any], name: str) -> None:
    """Raise ValueError unless `state` has the keys of `ours`, and tensors of the same dtypes and shapes."""
    if not isinstance(state, dict) or state.keys() != ours.keys():
        got = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{name} must hold {sorted(ours)}, got {got}")
    for key, mine in ours.items():
        theirs = state[key]
        if isinstance(mine, Tensor) and (
            not isinstance(theirs, Tensor) or theirs.shape != mine.shape or theirs.dtype != mine.dtype
        ):
            got = (
                f"{tuple(theirs.shape)} of {theirs.dtype}"
                if isinstance(theirs, Tensor)
                else type(theirs).__name__
            )
            raise ValueError(f"{name} {key} must be {tuple(mine.shape)} of {mine.dtype}, got {got}")
