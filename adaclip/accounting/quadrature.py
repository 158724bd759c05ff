"""Gauss–Legendre quadrature of a subsampled Gaussian step's moment function, with a proven error.

E_Q[u^{a + iω}] is an integral over the noise y of φ(y)·u(y)^{a + iω}, u = 1 − q + q·w(y) (see ``mixtures``). The
noise between two ends is cut into panels, and each is integrated by N Gauss–Legendre nodes. A function that is
analytic and at most M on the ellipse with foci at a panel's ends and semiaxes (ρ ± 1/ρ)/2 half widths has
Chebyshev coefficients ≤ 2M·ρ^{−k} (Bernstein). The rule is exact up to degree 2N − 1, odd terms vanish on both
sides, and an even one of degree k ≥ 2N ≥ 4 is wrong by at most 2 + 2/(k² − 1) ≤ 32/15, so the error is at most

    (half width)·(64/15)·M·ρ^{−2N}/(1 − ρ^{−2}),      N ≥ 2                 (Trefethen, ATAP, theorem 19.3)

M needs no search. At y + iη the density grows by e^{η²/2}; each w_j turns by jμη, all of them by at most θ = kμ|η|.
With r = q·w/u, for θ ≤ π/2 therefore u·(1 − r + r·cos θ) ≤ |u(y + iη)| ≤ u(y), and u turns by at most the angle of
1 − r + r·e^{iθ}, which grows with y and η: |u^{iω}| is at most e^{ω·angle}.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from adaclip.accounting.mixtures import EPS, Mixtures, loss_rounding

_PANEL = 2.5  # widest panel, in units of the noise
_ELLIPSES = np.array([1.3, 1.7, 2.2, 3.0, 4.0, 6.0, 9.0])
_MOST = 96  # nodes of a panel
_WEIGHTS = 128.0  # rounding of a weight, in units of eps
_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)


def cuts(low: float, high: float) -> tuple[float, float]:
    """(bottom, far) of ``ends`` that leave out about these probabilities, below and above."""
    return float(ndtri(min(max(low, 1e-310), 0.1))), -float(ndtri(min(max(high, 1e-310), 0.1)))


def ends(law: Mixtures, bottom: float, far: float) -> tuple[np.ndarray, np.ndarray]:
    """[E] ends of the noise that is kept: from ``bottom`` < 0 to ``far`` beyond the group's shift, and to −bottom."""
    return np.full(len(law.q), bottom), np.maximum(law.top + far, -bottom)


class Rule(NamedTuple):
    """Where to put nodes; any rule gives valid bounds.

    Attributes:
        nodes: [n] in (0, 1), from one end of the noise to the other.
        log_weights: [n] of weights that sum to 1.
        sizes: [P] nodes of each of P equal panels.
        ellipses: [P] ρ of each panel's error bound.
    """

    nodes: np.ndarray
    log_weights: np.ndarray
    sizes: np.ndarray
    ellipses: np.ndarray

    @classmethod
    def of(cls, sizes: np.ndarray, ellipses: np.ndarray) -> Rule:
        panels = len(sizes)
        parts = [_gauss(int(size)) for size in sizes]
        nodes = np.concatenate([(p + x) / panels for p, (x, _) in enumerate(parts)])
        weights = np.concatenate([w for _, w in parts])
        return cls(nodes, np.log(weights / panels), sizes, ellipses)


class Nodes(NamedTuple):
    """Events' measures on the nodes.

    Attributes:
        log_mass: [E, n] logarithm of weight times Q-density.
        loss: [E, n] log u.
        moved: [E, n] bound on the rounding error of each loss.
        error: [E, n] bound on the relative error of each mass by rounding of its node and its weight.
    """

    log_mass: np.ndarray
    loss: np.ndarray
    moved: np.ndarray
    error: np.ndarray

    def tilted(self, a: float) -> tuple[np.ndarray, np.ndarray]:
        """(weights [E, n] of mass·u^a, summing to 1; log of their sum [E])."""
        weights = a * self.loss
        weights += self.log_mass
        top = weights.max(axis=1, keepdims=True)
        np.exp(np.subtract(weights, top, out=weights), out=weights)
        total = weights.sum(axis=1, keepdims=True)
        weights /= total
        return weights, (top + np.log(total))[:, 0]

    def rounding(self, weights: np.ndarray, a: float) -> np.ndarray:
        """[E] bound on the relative rounding error of what ``tilted`` gives, but for that of log of the sum."""
        size = np.abs(self.log_mass) + abs(a) * np.abs(self.loss)
        terms = self.error + abs(a) * self.moved + 4.0 * EPS * size
        return EPS * (8.0 + weights.shape[1]) + (weights * terms).sum(axis=1)

    def log_upper(self, a: float, log_error: np.ndarray) -> np.ndarray:
        """[E] log of an upper bound on E_Q[u^a] over the noise between the ends, for this error of the rule."""
        weights, log_total = self.tilted(a)
        rounding = self.rounding(weights, a) + 4.0 * EPS * (1.0 + np.abs(log_total))
        return np.logaddexp(log_total + rounding, log_error + rounding)


def place(law: Mixtures, low: np.ndarray, high: np.ndarray, rule: Rule) -> Nodes:
    """Nodes for the noise between ``low`` and ``high`` [E]."""
    width = (high - low)[:, None]
    y = low[:, None] + width * rule.nodes
    log_w = law.log_w(y)
    loss = law.loss(log_w)
    log_mass = rule.log_weights + np.log(width) - 0.5 * y * y - _LOG_SQRT_2PI
    slip = 4.0 * EPS * (np.abs(low)[:, None] + width)
    moved = loss_rounding(law, log_w, loss, law.log_w_rounding(y, slip))
    error = np.abs(y) * slip + EPS * (_WEIGHTS + y * y + 4.0 * np.abs(np.log(width)))
    return Nodes(log_mass, loss, moved, error)


class Ellipses:
    """Events on the ellipses around the panels: what bounds the rule's error for any exponent.

    Args:
        law: [E] events, with noise between ``low`` and ``high`` [E].
        panels: P.
        rho: [K, 1] or [1, P].
    """

    def __init__(
        self, law: Mixtures, low: np.ndarray, high: np.ndarray, panels: int, rho: np.ndarray
    ) -> None:
        half = (0.5 * (high - low) / panels)[:, None, None]
        center = low[:, None, None] + half * (2.0 * np.arange(panels) + 1.0)
        reach = half * (0.5 * (rho + 1.0 / rho))
        height = half * (0.5 * (rho - 1.0 / rho))
        self._law = law
        self._left, right = center - reach, center + reach
        nearest = np.maximum(np.maximum(self._left, -right), 0.0)
        theta = height * law.top[:, None, None]
        size = 0.5 * (height * height - nearest * nearest) - _LOG_SQRT_2PI
        size += np.log(half) + math.log(64.0 / 15.0) - np.log1p(-(rho**-2.0))
        # Beyond π/2 nothing is claimed.
        self._size = np.where(theta <= 0.5 * math.pi, size, np.inf)
        self._theta = np.minimum(theta, 0.5 * math.pi)
        self._loss = self._losses(right)
        self._share = -np.expm1(np.minimum(law.floor[:, None, None] - self._loss, 0.0))

    def _losses(self, y: np.ndarray) -> np.ndarray:
        return self._law.loss(self._law.log_w(y.reshape(len(y), -1))).reshape(y.shape)

    def log_errors(self, a: float, omega: float) -> np.ndarray:
        """log of the error of each panel at N = 0, for every frequency up to ``omega`` ≥ 0.

        Returns:
            [E, K or 1, P]; N nodes lower it by 2N·log ρ. Infinite where θ > π/2.
        """
        loss, share, theta = self._loss, self._share, self._theta
        if a < 0.0:
            loss = self._losses(self._left) + np.log1p(-2.0 * share * np.sin(0.5 * theta) ** 2)
        size = self._size + a * loss
        if omega > 0.0:
            size += omega * np.arctan2(share * np.sin(theta), (1.0 - share) + share * np.cos(theta))
        return size


def choose(
    law: Mixtures, low: np.ndarray, high: np.ndarray, a: float, omega: float, log_tolerance: np.ndarray
) -> Rule | None:
    """A rule whose error is below e^``log_tolerance`` [E] for these events; None if it would take too many nodes."""
    for fine in (1, 2, 4):
        panels = fine * _panels(low, high)
        log_error = Ellipses(law, low, high, panels, _ELLIPSES[:, None]).log_errors(a, omega)
        log_error -= log_tolerance[:, None, None] - math.log(panels)
        sizes = np.maximum(log_error / (2.0 * np.log(_ELLIPSES[:, None])), 1.5).max(axis=0)
        best = sizes.argmin(axis=0)
        sizes = np.ceil(sizes[best, np.arange(panels)]) + 1.0
        if (sizes <= _MOST).all():
            return Rule.of(sizes.astype(int), _ELLIPSES[best])
    return None


def coarse(law: Mixtures, low: np.ndarray, high: np.ndarray) -> Rule:
    """A rule that does well for ω = 0 and moderate exponents."""
    panels = _panels(low, high)
    # The ellipse whose θ is just below π/2.
    height = 1.5 / float((0.5 * (high - low) / panels * law.top).max())
    ellipse = min(height + math.sqrt(height * height + 1.0), 3.5)
    return Rule.of(np.full(panels, 16), np.full(panels, ellipse))


def _panels(low: np.ndarray, high: np.ndarray) -> int:
    return math.ceil(float((high - low).max()) / _PANEL)


class Bounds:
    """The error of a rule, for events with noise between ``low`` and ``high`` [E]."""

    def __init__(self, law: Mixtures, low: np.ndarray, high: np.ndarray, rule: Rule) -> None:
        self._ellipses = Ellipses(law, low, high, len(rule.sizes), rule.ellipses[None, :])
        self._gain = 2.0 * rule.sizes * np.log(rule.ellipses)

    def log_error(self, a: float, omega: float) -> np.ndarray:
        """[E] log of a bound on the quadrature's error at every frequency up to ``omega``."""
        each = self._ellipses.log_errors(a, omega)[:, 0, :] - self._gain
        top = each.max(axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            total = (top + np.log(np.exp(each - top).sum(axis=1, keepdims=True)))[:, 0]
        return np.where(np.isfinite(total), total, np.inf)


class Placed(NamedTuple):
    """Events on the nodes of a rule: all that their moment functions are made of.

    Attributes:
        law, low, high: [E] events, and the ends of the noise that is kept.
        nodes: their measures there.
        bounds: the rule's error.
        log_outside: [E] log of the P-mass and of the Q-mass that is left out.
    """

    law: Mixtures
    low: np.ndarray
    high: np.ndarray
    nodes: Nodes
    bounds: Bounds
    log_outside: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, law: Mixtures, rule: Rule, bottom: float, far: float) -> Placed:
        """With noise kept between the ``ends`` for ``bottom`` and ``far``."""
        low, high = ends(law, bottom, far)
        nodes, bounds = place(law, low, high, rule), Bounds(law, low, high, rule)
        return cls(law, low, high, nodes, bounds, law.log_outside(low, high))


@functools.lru_cache(maxsize=_MOST)
def _gauss(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on (0, 1), weights to ``_WEIGHTS`` eps.

    By Newton's method for t, the distance from the end 1, of the upper half; from differences D_k = P_{k+1} − P_k,
    (k + 1)D_k = k·D_{k−1} − (2k + 1)·t·P_k. A weight 2/((1 − x²)P'²) is as good as t is relative to itself; from x,
    which knows t to eps only, it would be off by thousands of eps at the ends.
    """
    count = size // 2
    t = 1.0 - np.polynomial.legendre.leggauss(size)[0][size - count :]
    for _ in range(3):
        p, d = np.ones_like(t), -t
        for k in range(1, size):
            p = p + d
            d = (k * d - (2.0 * k + 1.0) * t * p) / (k + 1.0)
        slope = size * (t * (p + d) - d) / (t * (2.0 - t))
        t = t + (p + d) / slope
    weights = 1.0 / (t * (2.0 - t) * slope * slope)
    middle = [1.0 - 2.0 * weights.sum()] if size % 2 else []
    nodes = np.concatenate([0.5 * t[::-1], [0.5] * (size % 2), 1.0 - 0.5 * t])
    return nodes, np.concatenate([weights[::-1], middle, weights])
