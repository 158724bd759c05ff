"""Chernoff's bound on δ(ε) when an example is added, for steps that are composed one by one.

δ(ε) ≤ G(s)·e^{(1−s)ε}·(s − 1)^{s−1}/s^s for every s > 1, and in this direction G(s) = E_Q[u^{1−s}]. It is far too large
to be ε itself, and enough to show that removing the example costs more, which is the rule.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import numpy as np

from adaclip.accounting import quadrature
from adaclip.accounting.mixtures import EPS, Mixtures

_TILTS = np.exp(np.linspace(-1.0, 3.0, 9))  # of s − 1, around a guess


class Moments(NamedTuple):
    """Of E events, for one copy of each.

    Attributes:
        log_total: [E, S] log of upper bounds on G.
        outside: [E] Q-mass that is left out.
    """

    log_total: np.ndarray
    outside: np.ndarray


class Chernoff:
    """The moment function of a growing composition, adding an example, at a few s.

    Args:
        law: [E] events, of which some or all are to be composed; they decide where the noise is cut.
        s: [S] > 1; any is valid.
        lost: Q-mass that may be left out, per event.
    """

    def __init__(self, law: Mixtures, s: np.ndarray, lost: float) -> None:
        self._s = s
        self._log_total = np.zeros(len(s))
        self._size = np.zeros(len(s))  # of the summands, for rounding
        self._outside = 0.0
        self._bottom, self._far = quadrature.cuts(lost, lost)
        self._rule = quadrature.coarse(law, *quadrature.ends(law, self._bottom, self._far))

    @classmethod
    def near(cls, law: Mixtures, guess: float, lost: float) -> Chernoff:
        """At several s, from below ``guess`` to far above it."""
        return cls(law, 1.0 + (guess - 1.0) * _TILTS, lost)

    def moments(self, law: Mixtures) -> Moments:
        """What ``add`` composes."""
        low, high = quadrature.ends(law, self._bottom, self._far)
        nodes = quadrature.place(law, low, high, self._rule)
        log_total = np.empty((len(law.q), len(self._s)))
        for i, s in enumerate(self._s.tolist()):
            error = quadrature.error(law, low, high, self._rule, 1.0 - s, 0.0)
            log_total[:, i] = nodes.log_upper(1.0 - s, error)
        return Moments(log_total, np.exp(law.log_outside(low, high)[1]) * (1.0 + 1e-6))

    def add(self, moments: Moments, counts: np.ndarray) -> None:
        """Compose ``counts`` [E] copies of each event."""
        log_total = counts @ moments.log_total
        self._log_total = self._log_total + log_total
        self._size = self._size + counts @ np.abs(moments.log_total) + np.abs(log_total)
        self._outside += float(counts @ moments.outside)

    def copy(self) -> Chernoff:
        """The composition so far, to be continued in another way."""
        return copy.copy(self)

    def best(self, epsilon: float) -> float:
        """The s whose bound is least."""
        return float(self._s[self._heights(epsilon, 0.0).argmin()])

    def delta(self, epsilon: float, gauss: float = 0.0, overflow: float = 0.0) -> float:
        """An upper bound on δ(ε), with Gaussian releases of μ² = ``gauss`` and the given overflow."""
        height = float(self._heights(epsilon, gauss).min())
        beyond = self._outside + overflow * (1.0 + math.exp(min(epsilon, 700.0)))
        return math.exp(min(height, 0.0)) * (1.0 + 1e-6) + beyond

    def _heights(self, epsilon: float, gauss: float) -> np.ndarray:
        s, over = self._s, self._s - 1.0
        up, down = 0.5 * gauss * s * over, over * epsilon
        rounding = EPS * (8.0 * (self._size + up + down) + 16.0 * s * (1.0 + np.log(s)))
        return self._log_total + up - down + over * np.log(over) - s * np.log(s) + rounding
