"""Calibration: the least noise, the most steps or the highest sampling rate that a privacy budget allows.

Each answer is checked with the accountant's upper bound, so it never exceeds the target.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable

from adaclip.accounting import checks
from adaclip.accounting.registry import DEFAULT_ACCOUNTANT, create_accountant
from adaclip.accounting.releases import Event, SubsampledGaussian, check_guarantee, event_pairs

_TOLERANCE = 3e-4  # stop when log(ε/target) ≥ −_TOLERANCE; 1e-3 is what the docstrings promise
_AIM = -1.5e-4  # where log(ε/target) is wanted
_WIDTH = 1e-6  # relative width of the bracket at which a jump of the bound is accepted
_SIGMA_RANGE = (1e-3, 1e9)
_RATE_FLOOR = 1e-30
_MAX_STEPS = 10**12


def calibrate_noise(
    *,
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str = DEFAULT_ACCOUNTANT,
    adjacency: str = "add_remove",
    sampling: str = "poisson",
    overflow: float = 0.0,
    spent: Iterable[Event] = (),
) -> float:
    """Smallest noise multiplier (up to the tolerance) that keeps ``steps`` steps within (target_epsilon, delta).

    Args:
        target_epsilon: > 0, finite.
        delta: in (0, 1).
        sample_rate: sampling rate, in (0, 1]; 1 for shuffled batches, where ``steps`` counts epochs.
        steps: ≥ 1.
        accountant: a name for ``create_accountant``.
        adjacency, sampling, overflow: as in ``adaclip.accounting.releases``.
        spent: what the budget has been spent on already; the steps come on top.

    Returns:
        σ with ``target_epsilon · (1 − 1e-3) ≤ ε(σ) ≤ target_epsilon`` by that accountant's upper bound. Only the second
        inequality is promised where the bound jumps (RDP: at σ < 0.1, and down to ε = 0 where the steps' total
        variation is within δ; overflow: where its cost passes δ) and at the floor σ = 1e-3.

    Raises:
        ValueError, TypeError: an argument out of range, a sampling without guarantee under the adjacency, or a target
            out of reach for σ ≤ 1e9.
    """
    budget = _Budget(target_epsilon, delta, accountant, adjacency, sampling, overflow, spent)
    sample_rate = checks.positive_probability("sample_rate", sample_rate)
    steps = checks.integer("steps", steps, 1)
    budget.release(sample_rate, 1.0)

    def excess(x: float) -> float:
        return budget.excess(sample_rate, math.exp(-x), steps)

    # Few participations make the unsampled release's loss; many, and the central limit counts.
    expected = sample_rate * steps
    most = min(float(steps), expected + math.sqrt(2.0 * expected * budget.surprise) + budget.surprise)
    few = math.log(budget.mu) - 0.5 * math.log(most)
    many = _log_rate(2.0 * (math.log(budget.mu) - math.log(sample_rate)) - math.log(steps))
    slope = budget.slope * (_bend(many) if many > few else 1.0)
    found = _highest(excess, max(few, many), slope, -math.log(_SIGMA_RANGE[1]), -math.log(_SIGMA_RANGE[0]))
    if found is None:
        sigma = _SIGMA_RANGE[1]
        raise ValueError(
            f"{budget}, sample_rate={sample_rate!r}, steps={steps}: "
            f"even noise multiplier {sigma:g} gives epsilon {budget.epsilon(sample_rate, sigma, steps):.4g}"
        )
    return math.exp(-found)


def calibrate_sample_rate(
    *,
    target_epsilon: float,
    delta: float,
    noise_multiplier: float,
    steps: int,
    accountant: str = DEFAULT_ACCOUNTANT,
    adjacency: str = "add_remove",
    sampling: str = "poisson",
    overflow: float = 0.0,
    spent: Iterable[Event] = (),
) -> float:
    """Highest sampling rate (up to the tolerance) that keeps ``steps`` steps within (target_epsilon, delta).

    Args:
        noise_multiplier: > 0, finite.
        sampling: any but ``"shuffled"``, which has no rate. For ``"fixed_size"`` round the batch size ``q·N`` down.
        target_epsilon, delta, steps, accountant, adjacency, overflow, spent: as in ``calibrate_noise``.

    Returns:
        q in (0, 1] with ``ε(q) ≤ target_epsilon``, and ``≥ target_epsilon · (1 − 1e-3)`` unless q = 1 or the bound jumps
        (see ``calibrate_noise``).

    Raises:
        ValueError, TypeError: an argument out of range, a sampling without rate or without guarantee under the
            adjacency, or a target out of reach for q ≥ 1e-30.
    """
    budget = _Budget(target_epsilon, delta, accountant, adjacency, sampling, overflow, spent)
    noise_multiplier = checks.positive_finite("noise_multiplier", noise_multiplier)
    steps = checks.integer("steps", steps, 1)
    if sampling == "shuffled":
        raise ValueError(
            "sampling must be one with a rate, got 'shuffled': calibrate its noise or its steps instead"
        )
    budget.release(1.0, noise_multiplier)

    def excess(x: float) -> float:
        return budget.excess(math.exp(x), noise_multiplier, steps)

    start = math.log(budget.mu) - 0.5 * (math.log(steps) + _log_variance(noise_multiplier))
    start = max(start, math.log(budget.delta) - math.log(steps))
    found = _highest(excess, start, budget.slope, math.log(_RATE_FLOOR), 0.0)
    if found is None:
        epsilon = budget.epsilon(_RATE_FLOOR, noise_multiplier, steps)
        raise ValueError(
            f"{budget}, noise_multiplier={noise_multiplier!r}, steps={steps}: "
            f"even sampling rate {_RATE_FLOOR:g} gives epsilon {epsilon:.4g}"
        )
    return math.exp(found)


def calibrate_steps(
    *,
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    noise_multiplier: float,
    accountant: str = DEFAULT_ACCOUNTANT,
    adjacency: str = "add_remove",
    sampling: str = "poisson",
    overflow: float = 0.0,
    spent: Iterable[Event] = (),
) -> int:
    """Largest number of steps within (target_epsilon, delta): one step more would exceed it.

    Args:
        sample_rate: sampling rate, in (0, 1]; 1 for shuffled batches, where the steps are epochs.
        noise_multiplier: > 0, finite.
        target_epsilon, delta, accountant, adjacency, sampling, overflow, spent: as in ``calibrate_noise``.

    Returns:
        Steps ≥ 1, at most 10**12.

    Raises:
        ValueError, TypeError: an argument out of range, a sampling without guarantee under the adjacency, or not even
            one step fits.
    """
    budget = _Budget(target_epsilon, delta, accountant, adjacency, sampling, overflow, spent)
    sample_rate = checks.positive_probability("sample_rate", sample_rate)
    noise_multiplier = checks.positive_finite("noise_multiplier", noise_multiplier)
    budget.release(sample_rate, noise_multiplier)

    many = 2.0 * (math.log(budget.mu) - math.log(sample_rate)) - _log_variance(noise_multiplier)
    start = max(many, 2.0 * (math.log(budget.mu) + math.log(noise_multiplier)))
    hunt = _Hunt(0.0, math.log(_MAX_STEPS), 0.5 * budget.slope)
    good, bad = 0, _MAX_STEPS + 1
    steps = min(max(round(math.exp(min(start, hunt.high))), 1), _MAX_STEPS)
    while bad - good > 1:
        value = budget.excess(sample_rate, noise_multiplier, steps)
        if value <= 0.0:
            good = steps
        else:
            bad = steps
        hunt.add(math.log(steps), value)
        steps = min(max(round(math.exp(hunt.guess(0.0))), good + 1), bad - 1)
    if good == 0:
        epsilon = budget.epsilon(sample_rate, noise_multiplier, 1)
        raise ValueError(
            f"{budget}, sample_rate={sample_rate!r}, noise_multiplier={noise_multiplier!r}: "
            f"one step already gives epsilon {epsilon:.4g}"
        )
    return good


class _Budget:
    """A target, and ε of steps that are to meet it; its text begins an error message.

    Attributes:
        target, delta: the budget.
        surprise: log(1/δ).
        mu: μ for which N(μ, 1) against N(0, 1) costs about the target: where the search begins.
        slope: d log ε/d log μ there.
    """

    def __init__(
        self,
        target: float,
        delta: float,
        accountant: str,
        adjacency: str,
        sampling: str,
        overflow: float,
        spent: Iterable[Event],
    ) -> None:
        self.target = checks.positive_finite("target_epsilon", target)
        self.delta = checks.delta_value("delta", delta)
        self._sampling, self._overflow = sampling, overflow
        self._accountant = create_accountant(accountant, adjacency)
        for release, count in event_pairs("spent", spent):
            self._accountant.add(release, count)
        # ε = μ²/2 + μz, solved for μ; a neighbor that moves twice as far leaves half of it.
        self.surprise = -math.log(self.delta)
        z = math.sqrt(2.0 * self.surprise)
        mu = (
            math.sqrt(2.0) * self.target / (math.sqrt(self.surprise + self.target) + math.sqrt(self.surprise))
        )
        self.slope = (mu + z) / (0.5 * mu + z)
        self.mu = 0.5 * mu if adjacency == "replace_one" else mu

    def release(self, sample_rate: float, sigma: float) -> SubsampledGaussian:
        """One step, checked to have a guarantee."""
        release = SubsampledGaussian(sample_rate, sigma, self._sampling, self._overflow)
        check_guarantee(release, self._accountant.adjacency)
        return release

    def epsilon(self, sample_rate: float, sigma: float, steps: int) -> float:
        """Upper bound on ε of everything spent and ``steps`` steps."""
        return self._accountant.epsilon_after(self.release(sample_rate, sigma), steps, self.delta)

    def excess(self, sample_rate: float, sigma: float, steps: int) -> float:
        """log(ε/target): at most 0 exactly where the steps fit."""
        epsilon = self.epsilon(sample_rate, sigma, steps)
        if epsilon <= 0.0:
            return -math.inf
        value = math.log(epsilon) - math.log(self.target)
        return min(value, 0.0) if epsilon <= self.target else max(value, sys.float_info.min)

    def __str__(self) -> str:
        spent = (
            f", with {self._accountant.get_epsilon(self.delta):.4g} spent" if self._accountant.history else ""
        )
        return f"target_epsilon={self.target!r} cannot be met at delta={self.delta!r}{spent}"


class _Hunt:
    """Where to look next for the highest x at which an increasing function is at most 0.

    The zero of the secant through the last two values, until that closes in too slowly: then half the bracket, or
    strides that grow while there is none. Infinite values and jumps are allowed.

    Args:
        low, high: limits of x.
        slope: of the function, until two values are known.
    """

    def __init__(self, low: float, high: float, slope: float) -> None:
        self.low, self.high = low, high
        self.good: float | None = None
        self.bad: float | None = None
        self._slope, self._slow = slope, False
        self._move = 0.25
        self._last: tuple[float, float] | None = None

    @property
    def width(self) -> float:
        """Of the bracket; inf as long as there is none."""
        return math.inf if self.good is None or self.bad is None else self.bad - self.good

    def add(self, x: float, value: float) -> None:
        """The function is ``value`` at x, which lies between the ends of the bracket."""
        width = self.width
        if value <= 0.0:
            self.good = x
        else:
            self.bad = x
        if self._last is not None:
            before, last = self._last
            slope = (value - last) / (x - before)
            if 0.0 < slope < math.inf:
                self._slope = slope
            self._slow = not abs(value) < 0.5 * abs(last) and not self.width < 0.5 * width
        self._last = x, value

    def guess(self, aim: float) -> float:
        """Where the value may be ``aim`` (≤ 0)."""
        x, value = self._last
        step = (aim - value) / self._slope
        if self.good is not None and self.bad is not None:
            inside = self.good < x + step < self.bad
            return x + step if inside and not self._slow else 0.5 * (self.good + self.bad)
        least = 2.0 * self._move if self._slow else 0.0
        self._move = min(max(abs(step), least), 4.0 * self._move)
        return min(max(x + math.copysign(self._move, step), self.low), self.high)


def _highest(
    excess: Callable[[float], float], start: float, slope: float, low: float, high: float
) -> float | None:
    """The highest x in [low, high], up to the tolerance, with ``excess(x)`` ≤ 0; None if there is none."""
    hunt = _Hunt(low, high, slope)
    x = min(max(start, low), high)
    while True:
        value = excess(x)
        if value <= 0.0 and (value >= -_TOLERANCE or x == high):
            return x
        if value > 0.0 and x == low:
            return None
        hunt.add(x, value)
        if hunt.width <= _WIDTH:
            return hunt.good
        x = hunt.guess(_AIM)


def _log_variance(sigma: float) -> float:
    """log(e^{1/σ²} − 1), the variance of one sampled step's likelihood ratio without its q²."""
    rate = -2.0 * math.log(sigma)
    if rate < -700.0 or rate > 700.0:
        return rate if rate < 0.0 else math.inf
    rate = math.exp(rate)
    return rate + math.log(-math.expm1(-rate))


def _log_rate(log_variance: float) -> float:
    """log(1/σ) that has this ``_log_variance``."""
    if log_variance < -30.0:
        return 0.5 * log_variance
    return 0.5 * math.log(max(log_variance, 0.0) + math.log1p(math.exp(-abs(log_variance))))


def _bend(x: float) -> float:
    """d/dx ½·log(e^{1/σ²} − 1) at x = log(1/σ)."""
    rate = math.exp(min(2.0 * x, 700.0))
    return rate / -math.expm1(-rate) if rate > 0.0 else 1.0
