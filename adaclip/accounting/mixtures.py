"""Poisson-subsampled Gaussian steps: dominating pairs, their likelihood ratio and privacy loss.

P = Σ_j c_j N(jμ, 1) is mixed with weight q into Q = N(0, 1), in units of the noise: likelihood ratio
u = 1 − q + q·w, w(y) = Σ_j c_j exp(jμy − j²μ²/2). (One example: the single shift j = 1, w = e^z with
z = μy − μ²/2; Zhu, Dong, Wang 2022, arXiv 2106.08567.) q enters through u = 1 + q(w − 1) alone, so nothing
cancels however small it is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.special import log_ndtr

from adaclip.accounting.gaussian import log_cell_masses

EPS = float(np.finfo(np.float64).eps)


class Mixtures(NamedTuple):
    """E events, each with its own rate and shift, and one law of the group's sample.

    Attributes:
        q: [E] probability that at least one of the group takes part, in (0, 1).
        mu: [E] shift of one example in units of the noise, 1/σ.
        log_weights: [E, k] log c_j, j = 1…k: how many take part if any does; zeros [E, 1] for one example.
    """

    q: np.ndarray
    mu: np.ndarray
    log_weights: np.ndarray

    def take(self, rows: np.ndarray) -> Mixtures:
        """The events of these rows."""
        return Mixtures(self.q[rows], self.mu[rows], self.log_weights[rows])

    @property
    def top(self) -> np.ndarray:
        """[E] shift of the whole group."""
        return self.mu * self.log_weights.shape[1]

    @property
    def floor(self) -> np.ndarray:
        """[E] the least loss, log(1 − q)."""
        return np.log1p(-self.q)

    def log_w(self, y: np.ndarray) -> np.ndarray:
        """log w(y), y [E, n]."""
        return self._mix(lambda shift: shift * y - 0.5 * shift * shift)

    def log_p(self, edges: np.ndarray) -> np.ndarray:
        """log of the mass that Σ_j c_j N(jμ, 1) gives the cells, [E, m + 1]."""
        return self._mix(lambda shift: log_cell_masses(edges - shift))

    def log_w_rounding(self, y: np.ndarray, slip: np.ndarray | float = 0.0) -> np.ndarray:
        """[E, n] bound on the error of ``log_w`` by rounding, for y known to ``slip``."""
        top = self.top[:, None]
        size = top * (np.abs(y) + top)
        error = 3.0 * EPS * size + top * slip
        if self.log_weights.shape[1] > 1:
            most = -self.log_weights.min(axis=1, keepdims=True)
            error += EPS * (self.log_weights.shape[1] + 1.0) * (4.0 + size + most) + self.weight_rounding
        return error

    @property
    def weight_rounding(self) -> np.ndarray:
        """[E, 1] bound on the relative rounding error of q·c_j: none for one example, whose q is as given."""
        k = self.log_weights.shape[1]
        if k == 1:
            return np.zeros((len(self.q), 1))
        # Sums of k·log q, of k·log(1 − q), which is less or within k of it, and of logarithms of factorials.
        size = np.abs(self.log_weights[:, -1]) + np.abs(np.log(self.q)) + k * (2.0 + math.log(k))
        return (16.0 * EPS * (4.0 + size))[:, None]

    def loss(self, log_w: np.ndarray) -> np.ndarray:
        """log(1 − q + q·w), [E, n]."""
        q = self.q[:, None]
        log_q = np.log(q)
        # Nothing cancels in 1 + q(w − 1) unless it is nearly 1 − q, and that is tiny; q·w might overflow.
        switch = np.where(q <= 0.5, np.clip(-log_q, 1.0, 700.0), -np.inf)
        small = np.log1p(q * np.expm1(np.minimum(log_w, np.maximum(switch, 0.0))))
        return np.where(log_w < switch, small, np.logaddexp(np.log1p(-q), log_q + log_w))

    def log_outside(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[E] log of the P-mass and of the Q-mass below ``low`` and above ``high`` [E]."""

        def beyond(shift: np.ndarray) -> np.ndarray:
            return np.logaddexp(log_ndtr(low[:, None] - shift), log_ndtr(shift - high[:, None]))

        log_q = beyond(np.zeros((len(low), 1)))
        log_p = np.logaddexp(np.log1p(-self.q)[:, None] + log_q, np.log(self.q)[:, None] + self._mix(beyond))
        return log_p[:, 0], log_q[:, 0]

    def _mix(self, term) -> np.ndarray:
        mu = self.mu[:, None]
        total = None
        for j in range(self.log_weights.shape[1]):
            part = self.log_weights[:, j, None] + term((j + 1.0) * mu)
            total = part if total is None else np.logaddexp(total, part)
        return total


def loss_rounding(
    law: Mixtures, log_w: np.ndarray, loss: np.ndarray, error: np.ndarray | float
) -> np.ndarray:
    """Rounding of log(1 − q + q·w) for an error in log w: only the share q·w/u of it arrives; [E, n]."""
    share = -np.expm1(np.minimum(law.floor[:, None] - loss, 0.0))
    return share * (error + 8.0 * EPS * (1.0 + np.abs(log_w))) + 8.0 * EPS * np.abs(loss)
