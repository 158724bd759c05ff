"""How fast a subsampled Gaussian step's characteristic function falls, for every frequency from some one on.

Where the density ρ of the (tilted) privacy loss is at least h on an interval of length x, the box of height h and
length x contributes at most min(2h/ω, hx) to |∫ρ(l)e^{iωl} dl|, and all else at most its mass. With a minorant of ρ
that rises to one peak and falls from it, whose level sets are intervals of lengths x(h),

    |∫ ρ(l) e^{iωl} dl| ≤ 1 − ∫ (x(h) − 2/ω)₊ dh,

which falls with ω: one number bounds all higher frequencies. In terms of the noise y, ρ = φ(y)·u^a/(dl/dy), and
dl/dy ≤ kμ·(1 − (1 − q)/u).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from adaclip.accounting.mixtures import EPS, Mixtures

_CELLS = 100
_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)


class Decay(NamedTuple):
    """Level sets of the minorants.

    Attributes:
        heights: [E, m] falling.
        lengths: [E, m] of the sets where the minorant is at least that high.
    """

    heights: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, law: Mixtures, low: np.ndarray, high: np.ndarray, a: float, log_total: np.ndarray) -> Decay:
        """For noise between ``low`` and ``high`` [E], tilted by u^a, of mass e^``log_total`` [E]."""
        y = low[:, None] + (high - low)[:, None] * np.linspace(0.0, 1.0, _CELLS + 1)
        log_w = law.log_w(y)
        loss = law.loss(log_w)
        slope = law.top[:, None] * -np.expm1(law.floor[:, None] - loss[:, 1:])
        ends = -0.5 * np.maximum(np.abs(y[:, 1:]), np.abs(y[:, :-1])) ** 2
        height = ends + a * (loss[:, :-1] if a >= 0.0 else loss[:, 1:]) - log_total[:, None] - _LOG_SQRT_2PI
        # Lengths are differences of losses; their rounding, generously, is taken from the heights.
        rounding = 64.0 * EPS * (1.0 + np.abs(log_w[:, 1:])) / (law.mu * (high - low) / _CELLS)[:, None]
        height = np.exp(np.minimum(height, 600.0)) / slope * np.maximum(1.0 - 1e-9 - rounding, 0.0)
        length = np.diff(loss, axis=1)
        peak = height.argmax(axis=1)[:, None]
        cell = np.arange(_CELLS)
        rising = np.where(cell <= peak, height, np.inf)[:, ::-1]
        falling = np.where(cell >= peak, height, np.inf)
        rising = np.minimum.accumulate(rising, axis=1)[:, ::-1]
        falling = np.minimum.accumulate(falling, axis=1)
        height = np.where(cell < peak, rising, falling)
        order = np.argsort(-height, axis=1)
        return cls(
            np.take_along_axis(height, order, axis=1),
            np.cumsum(np.take_along_axis(length, order, axis=1), axis=1),
        )

    def deficit(self, omega: float) -> np.ndarray:
        """[E] by how much less than 1 the characteristic function is at every frequency ≥ ``omega``."""
        beyond = np.maximum(self.lengths - 2.0 / omega, 0.0)
        beyond[:, 1:] -= beyond[:, :-1]
        return np.minimum((self.heights * beyond).sum(axis=1), 1.0 - 1e-9)
