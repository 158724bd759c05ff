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

from adaclip.accounting.mixtures import EPS, Mixtures, loss_rounding

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
        y = np.minimum(y, high[:, None])
        log_w, error = law.log_w(y), law.log_w_rounding(y)
        loss = law.loss(log_w)
        moved = loss_rounding(law, log_w, loss, error)
        log_q = np.log(law.q)[:, None]
        # The share q·w/u by its logarithm: 1 − (1 − q)/u would be rounding where w is small.
        log_share = np.minimum(log_q + log_w[:, 1:] - loss[:, 1:], 0.0)
        squares = np.maximum(np.abs(y[:, 1:]), np.abs(y[:, :-1])) ** 2
        tilt = slice(None, -1) if a >= 0.0 else slice(1, None)
        height = -0.5 * squares + a * loss[:, tilt] - log_total[:, None] - _LOG_SQRT_2PI
        height -= np.log(law.top)[:, None] + log_share
        # Rounding lowers the heights and the lengths, which are differences of losses.
        size = (
            squares
            + np.abs(a * loss[:, tilt])
            + np.abs(log_total)[:, None]
            + np.abs(log_q)
            + np.abs(log_share)
        )
        height -= abs(a) * moved[:, tilt] + error[:, 1:] + moved[:, 1:] + 8.0 * EPS * (8.0 + size)
        height = np.exp(np.minimum(height, 600.0))
        length = np.maximum(np.diff(loss, axis=1) - moved[:, 1:] - moved[:, :-1], 0.0)
        peak = height.argmax(axis=1)[:, None]
        cell = np.arange(_CELLS)
        rising = np.where(cell <= peak, height, np.inf)[:, ::-1]
        falling = np.where(cell >= peak, height, np.inf)
        rising = np.minimum.accumulate(rising, axis=1)[:, ::-1]
        falling = np.minimum.accumulate(falling, axis=1)
        height = np.where(cell < peak, rising, falling)
        order = np.argsort(-height, axis=1)
        rows = np.arange(len(order))[:, None]
        return cls(height[rows, order], np.cumsum(length[rows, order], axis=1))

    def deficit(self, omega: float) -> np.ndarray:
        """[E] by how much less than 1 the characteristic function is at every frequency ≥ ``omega``."""
        beyond = np.maximum(self.lengths - 2.0 / omega, 0.0)
        beyond[:, 1:] -= beyond[:, :-1]
        return np.minimum((self.heights * beyond).sum(axis=1), 1.0 - 1e-9)
