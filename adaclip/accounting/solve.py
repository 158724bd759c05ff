"""From a bound on δ(ε) to one on ε(δ)."""

from __future__ import annotations

import math
from typing import Protocol


class Bound(Protocol):
    """A bound on a δ(ε) that falls with ε."""

    upper: bool

    def delta(self, epsilon: float) -> tuple[float, float]:
        """(bound on δ(ε), derivative of its main term in ε)."""


def solve(bound: Bound, delta: float, start: float, tolerance: float = 1e-10) -> float:
    """The bound on ε that a bound on δ(ε) gives: where it falls to δ, on its safe side; 0 if it begins below."""
    if bound.upper and bound.delta(0.0)[0] <= delta:
        return 0.0
    low, high = 0.0, math.inf  # δ(low) > delta ≥ δ(high), as far as known; ε ≥ 0 needs no proof
    x, target = max(start, 0.0), math.log(delta)
    for _ in range(60):
        value, slope = bound.delta(x)
        if value > delta:
            low = max(low, x)
        else:
            high = min(high, x)
        if high < math.inf and high - low <= tolerance * high:
            break
        step = (math.log(value) - target) * value / -slope if value > 0.0 and slope < 0.0 else math.nan
        # Overshoot a little to the side that is still open, so that the bracket closes on both.
        guess = x + step + math.copysign(0.1 * tolerance * (abs(x) + abs(step)), step)
        if math.isnan(guess) or not low < guess < high:
            guess = 2.0 * low + 1e-3 if math.isinf(high) else 0.5 * (low + high)
        x = guess
    return high if bound.upper else low
