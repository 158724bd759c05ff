"""The part of a composition in which at least one step has a large loss.

With q ≪ 1 and small σ, most steps lose next to nothing and a few, of probability 1e-10 in all, lose a lot. No tilt
fits both: where δ(ε) comes from the rare ones, the transform of the whole is 1e10 times larger than δ, and its
rounding with it. So the losses of every step are cut at a threshold into a small part B and a large part J, and

    (B + J)^T = B^T + ((B + J)^T − B^T):

the first is the composition of the small losses alone, which can be tilted as far as need be; the second, of
probability about T·J, is evaluated without cancellation as B^T·expm1(T·log1p(J/B)). Both are measures ≥ 0, so all
bounds hold for each, and δ(ε) is the sum.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import logsumexp

from adaclip.accounting.atoms import Atoms
from adaclip.accounting.mixtures import EPS
from adaclip.accounting.transform import Composed, Contour, Tilted

_MOST = 500.0  # largest log((B + J)^T/B^T) at ω = 0


class ComposedJumps(Composed):
    """(B + J)^T − B^T along a contour. Laws added by ``add`` have no large part."""

    def __init__(self, contour: Contour, *, upper: bool) -> None:
        super().__init__(contour, upper=upper)
        self._ratio = np.zeros(contour.count, dtype=np.complex128)  # Σ T·log1p(J/B)
        self._log_both = np.zeros(contour.count)  # Σ T·log(1 + J(0)/|B|), with |B| at its bound
        self._large = np.zeros(contour.count)  # Σ T·J(0)/(|B| + J(0))
        self._large_error = np.zeros(contour.count)
        self._log_ratio = 0.0  # Σ T·log1p(J(0)/B(0)): (B + J)^T/B^T at ω = 0
        self._alias_ratio = 0.0  # the same at contour.alias, and at s = 1 as a probability
        self._probability = 0.0

    def add_split(self, small: Atoms, large: Atoms, counts: np.ndarray) -> None:
        """Compose ``counts`` [E] copies of each event's law, in two parts."""
        counts = np.asarray(counts, dtype=np.float64)
        b, j = Tilted.of(small, self.contour.s), Tilted.of(large, self.contour.s)
        self._add_moments(small, counts, b)
        ratio = np.exp(np.minimum(j.log_total - b.log_total, 600.0))
        self._log_ratio += float(counts @ np.log1p(ratio))
        self._infinite += float(counts @ large.infinite)
        a = self.contour.alias
        log_large = logsumexp(large.log_mass + a * large.loss, axis=1)
        log_small = logsumexp(small.log_mass + a * small.loss, axis=1)
        self._alias_ratio += float(counts @ np.logaddexp(0.0, log_large - log_small))
        self._probability += float(counts @ np.exp(large.log_mass + large.loss).sum(axis=1))
        j = j._replace(weights=j.weights * ratio[:, None])
        for rows in self._chunks(b):
            n = counts[rows]
            values, error = self._values(b, rows)
            jumps, jumps_error = self._values(j, rows)
            bound = np.abs(values) + error
            self._multiply(values, bound, error, n)
            # B at its bound, as in the product: what is computed stays below the bound on its size, and where |B|
            # is rounding alone nothing is divided by it.
            turn = np.exp(-1j * np.arctan2(values.imag, values.real))
            self._ratio += n @ _log1p(jumps / bound * turn)
            both = bound + ratio[rows, None]
            self._log_both += n @ np.log(both / bound)
            self._large += n @ (ratio[rows, None] / both)
            self._large_error += n @ (jumps_error / both)

    def _sizes(self) -> tuple[np.ndarray, float]:
        log_size = self._log_bound + self._log_both + np.log(np.minimum(np.maximum(self._large, 1e-300), 1.0))
        # So many large losses are no case for this; without a limit nothing is claimed.
        return log_size, math.expm1(self._log_ratio) if self._log_ratio < _MOST else math.inf

    def _rounding(self) -> np.ndarray:
        # |∂| of (b + j)^T − b^T in b is at most T(T − 1)·(b + j)^{T−2}·j, in j at most T·(b + j)^{T−1}.
        large = np.maximum(self._large, 1e-300)
        own = EPS * (128.0 + 2.0 * np.abs(self._ratio))
        absolute = self._large * (super()._rounding() + own) + self._large_error
        return absolute / np.minimum(large, 1.0)

    def _product(self) -> np.ndarray:
        # B^T·expm1(T·log1p(J/B)); where that is large B^T may underflow, and the difference is well conditioned.
        both = np.exp(
            np.minimum(self._log_bound + self._ratio.real, 600.0) + 1j * (self._phase + self._ratio.imag)
        )
        x, y = np.minimum(self._ratio.real, 1.0), self._ratio.imag
        real = np.expm1(x) * np.cos(y) - 2.0 * np.sin(0.5 * y) ** 2
        small = super()._product()
        return np.where(self._ratio.real > 1.0, both - small, small * (real + 1j * np.exp(x) * np.sin(y)))

    def _alias(self, epsilon: float) -> float:
        log_moment = self._log_alias + _log_expm1(self._alias_ratio)
        return self._alias_terms(epsilon, min(self._probability, 1.0), log_moment)


def _log1p(z: np.ndarray) -> np.ndarray:
    """log(1 + z), accurate for small complex z."""
    x, y = z.real, z.imag
    size = np.hypot(1.0 + x, y)
    near = np.abs(z) < 0.5
    x_near, y_near = np.where(near, x, 0.0), np.where(near, y, 0.0)
    close = 0.5 * np.log1p(2.0 * x_near + x_near * x_near + y_near * y_near)
    return np.where(near, close, np.log(np.maximum(size, 1e-300))) + 1j * np.arctan2(y, 1.0 + x)


def _log_expm1(x: float) -> float:
    return x + math.log(-math.expm1(-x)) if x > 0.0 else -math.inf
