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
from adaclip.accounting.quadrature import Placed

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
        s: [S] > 1; any is valid.
    """

    def __init__(self, s: np.ndarray) -> None:
        self._s = s
        self._log_total = np.zeros(len(s))
        self._size = np.zeros(len(s))  # of the summands, for rounding
        self._outside = 0.0

    @classmethod
    def near(cls, law: Mixtures, counts: np.ndarray, guess: float, lost: float) -> Chernoff:
        """``counts`` [E] copies of each event, at several s from below ``guess`` to far above it.

        ``lost``: Q-mass that may be left out, of all events together.
        """
        made = cls(1.0 + (guess - 1.0) * _TILTS)
        bottom, far = quadrature.cuts(lost / float(counts.sum()), lost / float(counts.sum()))
        rule = quadrature.coarse(law, *quadrature.ends(law, bottom, far))
        made.add(made.moments(Placed.of(law, rule, bottom, far)), counts)
        return made

    def moments(self, placed: Placed) -> Moments:
        """What ``add`` composes."""
        log_total = np.empty((len(placed.low), len(self._s)))
        for i, s in enumerate(self._s.tolist()):
            log_total[:, i] = placed.nodes.log_upper(1.0 - s, placed.bounds.log_error(1.0 - s, 0.0))
        return Moments(log_total, np.exp(placed.log_outside[1]) * (1.0 + 1e-6))

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
