"""Where to evaluate, and how finely: the saddle point, the cells and the damping for a wanted accuracy.

Nothing here is part of the certificate. A bad plan makes the two bounds lie further apart, never wrong.

With the tilted law of one step, ρ(l) on the loss axis, cells of width d(l) move ε up by s·T·E[d²]/12 and down by
half of that, so d ∝ ρ^{−1/3} needs the fewest cells: m = (s·T·A³ / (8·Δε))^{1/2} with A = ∫ρ^{1/3} dl. The
damping moves ε by τ²/2·(1 − δ''/δ') either way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.special import expit, ndtri

from adaclip.accounting.atoms import Atoms, discretize
from adaclip.accounting.mixtures import Mixtures
from adaclip.accounting.transform import Contour

_STEP = 0.2  # of the coarse cells, in units of the noise
_LOST = 1e-6  # share of δ that may be spent on losses beyond the last cell
_CELLS = 6000
_FREQUENCIES = 60_000


class Target(NamedTuple):
    """Errors in ε that are aimed at, upper and lower bound together.

    Attributes:
        damping: by the damping, τ² times ``bend`` in all.
        cells: by the cells.
        bend: 1 − δ''/δ' at ε; s of the saddle point, until it has been measured.
    """

    damping: float
    cells: float
    bend: float


class Plan(NamedTuple):
    """A contour for ε near some value, and how far the cells may move it."""

    contour: Contour
    cells: float


class Draft:
    """A coarse picture of a composition, of at most a few representative events.

    Args:
        law: [R] representatives.
        counts: [R] how many events each stands for.
        fixed: laws that are atomic as they are, with their counts.
        gauss: μ² of the Gaussian releases.
        swapped: the direction that adds an example.
        delta: where ε is wanted.
        part: "whole", or with a threshold "small" or "jumps" (see ``jumps``).
        threshold: [R] ends of the small losses in units of the noise.
    """

    def __init__(
        self,
        law: Mixtures | None,
        counts: np.ndarray,
        fixed: list[tuple[Atoms, float]],
        gauss: float,
        swapped: bool,
        delta: float,
        part: str = "whole",
        threshold: np.ndarray | None = None,
    ) -> None:
        self.law, self.counts, self.part = law, counts, part
        self.gauss, self._log_delta = gauss, math.log(delta)
        self._parts: list[tuple[Atoms, np.ndarray]] = []
        self._tails: list[tuple[Atoms, np.ndarray]] = []  # upper laws: coarse cells hide how heavy a tail is
        self._jumps: Atoms | None = None
        self._jump_tail: Atoms | None = None
        self._grids: list[np.ndarray] = []
        if law is not None:
            bottom, top = self.ends(law, counts, delta)
            self._grids = [_grid(bottom, top if threshold is None else threshold)]
            upper, lower = discretize(law, self._grids[0], first=not swapped, last=False)
            self._parts.append((lower.swapped() if swapped else lower, counts))
            self._tails.append((upper.swapped() if swapped else upper, counts))
            if part == "jumps":
                self._grids.append(_grid(threshold, top))
                upper, self._jumps = discretize(law, self._grids[1], first=False, last=False)
                self._jump_tail = upper
        for atoms, count in fixed:
            part = (atoms.swapped() if swapped else atoms, np.array([float(count)]))
            self._parts.append(part)
            self._tails.append(part)

    @staticmethod
    def ends(law: Mixtures, counts: np.ndarray, delta: float) -> tuple[np.ndarray, np.ndarray]:
        """[R] below and above which losses are too rare to matter at δ, in units of the noise.

        They would forbid the tilt that the others need: with a few enormous losses E[e^{sL}] is theirs alone.
        """
        bottom = float(ndtri(min(_LOST * delta / float(counts.sum()), 0.1)))
        far = min(_LOST * delta / float(counts @ law.q), 0.1)
        return np.full(len(counts), bottom), law.log_weights.shape[1] * law.mu - float(ndtri(far))

    def moments(self, s: float) -> tuple[float, float, float]:
        """log of the part's moment function at s, and its first two derivatives."""
        value = 0.5 * self.gauss * s * (s - 1.0)
        first, second = self.gauss * (s - 0.5), self.gauss
        for atoms, counts in self._parts:
            total, mean, variance = _cumulants(atoms, s)
            value += float(counts @ total)
            first += float(counts @ mean)
            second += float(counts @ variance)
        if self._jumps is None:
            return value, first, second
        # log((B + J)^T − B^T) from that of B^T, free of cancellation for J ≪ B.
        small, m0, v0 = _cumulants(self._parts[0][0], s)
        large, m1, v1 = _cumulants(self._jumps, s)
        share = expit(large - small)
        shift, n = share * (m1 - m0), self.counts
        ratio = float(n @ np.logaddexp(0.0, large - small))
        gain = float(n @ shift)
        spread = float(n @ (share * (v1 + m1 * m1 - v0 - m0 * m0) - shift * (2.0 * m0 + shift)))
        any_jump = -math.expm1(-ratio)
        lift = gain / any_jump
        curve = (spread + gain * (gain + 2.0 * first)) / any_jump - lift * (lift + 2.0 * first)
        return value + ratio + math.log(any_jump), first + lift, second + max(curve, 0.0)

    def saddle(self) -> tuple[float, float, float]:
        """(s, ε, spread) for which the saddle-point approximation of δ(ε) is the wanted one."""

        def at(x: float) -> tuple[float, float, float]:
            s = 1.0 + math.exp(x)
            value, first, second = self.moments(s)
            epsilon = first - 1.0 / s - 1.0 / (s - 1.0)
            curvature = second + s**-2 + (s - 1.0) ** -2
            height = (
                value
                - (s - 1.0) * epsilon
                - math.log(s * (s - 1.0))
                - 0.5 * math.log(2 * math.pi * curvature)
            )
            return height - self._log_delta, s, epsilon

        low, high = -3.0, 3.0
        while at(low)[0] < 0.0 and low > -20.0:
            low -= 2.0
        while at(high)[0] > 0.0 and high < 30.0:
            high += 2.0
        x = low if at(low)[0] < 0.0 else high if at(high)[0] > 0.0 else _root(lambda x: at(x)[0], low, high)
        _, s, epsilon = at(x)
        return s, epsilon, math.sqrt(self.moments(s)[2])

    def delta_at(self, epsilon: float) -> float:
        """The saddle-point approximation of δ(ε)."""
        s = self.saddle_at(epsilon)
        curvature = self.moments(s)[2] + s**-2 + (s - 1.0) ** -2
        return math.exp(min(self.height(s, epsilon) - 0.5 * math.log(2.0 * math.pi * curvature), 0.0))

    def saddle_at(self, epsilon: float) -> float:
        """s of the saddle point for a given ε."""

        def slope(x: float) -> float:
            s = 1.0 + math.exp(x)
            return self.moments(s)[1] - 1.0 / s - 1.0 / (s - 1.0) - epsilon

        low, high = -3.0, 3.0
        while slope(low) > 0.0 and low > -20.0:
            low -= 2.0
        while slope(high) < 0.0 and high < 30.0:
            high += 2.0
        return 1.0 + math.exp(
            low if slope(low) > 0.0 else high if slope(high) < 0.0 else _root(lambda x: -slope(x), low, high)
        )

    def plan(self, epsilon: float, target: Target) -> Plan:
        """Contour and cells for the errors of ``target``, near (ε, δ)."""
        saddle = self.saddle_at(epsilon)
        height = self.height(saddle, epsilon)
        best: Plan | None = None
        # A heavy tail makes the window at the saddle point long: further left it is shorter, and terms that
        # are up to e⁶ times larger relative to δ cost no accuracy that matters.
        for share in _TILTS:
            s = 1.0 + (saddle - 1.0) * share
            if self.height(s, epsilon) > height + 6.0:
                break
            contour = self._contour(s, epsilon, target)
            if best is None or contour.count < best.contour.count:
                best = Plan(contour, target.cells)
        assert best is not None
        return best

    def height(self, s: float, epsilon: float) -> float:
        """log of the integrand at s, ω = 0."""
        return self.moments(s)[0] - (s - 1.0) * epsilon - math.log(s * (s - 1.0))

    def _contour(self, s: float, epsilon: float, target: Target) -> Contour:
        log_tolerance = math.log(min(0.01 * (s - 1.0) * target.damping, 1e-3)) + self._log_delta
        tau = min(math.sqrt(target.damping / target.bend), 20.0)
        if self.gauss >= tau * tau:
            tau = 0.0
        damping = max(tau * tau + self.gauss, 1e-300)
        window, alias = self.window(s, epsilon, log_tolerance)
        scale = max(self.height(s, epsilon) - self._log_delta, 0.0)
        reach = math.sqrt(2.0 * (3.0 + scale + self._log_delta - log_tolerance) / damping)
        count = min(int(reach * window / (2.0 * math.pi)) + 2, _FREQUENCIES)
        return Contour(float(s), alias, window, count, tau)

    def window(self, s: float, epsilon: float, log_tolerance: float) -> tuple[float, float]:
        """(W, alias) for which the neighboring windows add less than e^``log_tolerance`` to δ(ε)."""
        left = -log_tolerance / (s - 1.0)
        right, alias = min(
            self._right_window(s, a, epsilon, log_tolerance) for a in 1.0 + (s - 1.0) * _ALIASES
        )
        return 1.05 * float(max(left, right)), float(alias)

    def spread(self, s: float) -> float:
        """Standard deviation of the tilted loss."""
        return math.sqrt(self.moments(s)[2])

    def _right_window(self, s: float, a: float, epsilon: float, log_tolerance: float) -> tuple[float, float]:
        height = 0.5 * self.gauss * a * (a - 1.0)
        height += sum(float(counts @ _tilted(atoms, a)[1]) for atoms, counts in self._tails)
        if self._jump_tail is not None:
            odds = _tilted(self._jump_tail, a)[1] - _tilted(self._tails[0][0], a)[1]
            ratio = float(self.counts @ np.logaddexp(0.0, odds))
            height += ratio + math.log(max(-math.expm1(-ratio), 1e-300))
        height += (a - 1.0) * (math.log(a - 1.0) - epsilon) - a * math.log(a)
        return (height - log_tolerance) / (a - s), a

    def edges(self, plan: Plan) -> list[np.ndarray]:
        """[R, m] ends of the cells, one row a representative; of the small and of the large losses for "jumps"."""
        s = plan.contour.s
        weights = [_tilted(self._parts[0][0], s)[0]]
        if self._jumps is not None:
            small, large = _cumulants(self._parts[0][0], s)[0], _cumulants(self._jumps, s)[0]
            expected = float(self.counts @ expit(large - small))
            # How many of a step's losses are large, given that one of the composition is.
            often = expit(large - small) / max(-math.expm1(-expected), 1e-300)
            weights.append(_tilted(self._jumps, s)[0] * np.minimum(often, 1.0)[:, None])
        densities, widths = [], []
        for weight, y in zip(weights, self._grids, strict=True):
            loss = self.law.loss(self.law.log_w(y))
            width = np.diff(loss, axis=1)
            if weight.shape[1] > width.shape[1]:
                # The first cell is part of the law, and begins at the least loss of all.
                width = np.concatenate([loss[:, :1] - np.log1p(-self.law.q)[:, None], width], axis=1)
            densities.append(np.cbrt(weight * width * width))
            widths.append(width)
        area = sum(density.sum(axis=1, keepdims=True) for density in densities)
        cells = math.sqrt(s * float(self.counts @ area[:, 0] ** 3) / (8.0 * plan.cells))
        cells = min(max(cells, 4.0), _CELLS)
        out = []
        for density, width, y in zip(densities, widths, self._grids, strict=True):
            # Between the cells that carry weight the losses still must not jump by much more than 1/s.
            rank = np.cumsum(
                cells * density / np.maximum(area, 1e-300) + np.minimum(s * width / 1.5, 4.0) + 1e-6, axis=1
            )
            share = np.linspace(0.0, 1.0, math.ceil(float(rank[:, -1].max())) + 1)
            known = y if rank.shape[1] < y.shape[1] else np.concatenate([y[:, :1] - 1.0, y], axis=1)
            start = np.zeros((len(y), 1))
            rank = np.concatenate([start, rank], axis=1)
            out.append(np.stack([np.interp(share * r[-1], r, k) for r, k in zip(rank, known, strict=True)]))
        return out


def _grid(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    size = int(float((end - start).max()) / _STEP) + 3
    return start[:, None] + np.linspace(0.0, 1.0, size) * (end - start)[:, None]


def _cumulants(atoms: Atoms, s: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(log G(s), mean, variance) of each law tilted by s, [E]."""
    weights, total = _tilted(atoms, s)
    mean = (weights * atoms.loss).sum(axis=1)
    return total, mean, (weights * (atoms.loss - mean[:, None]) ** 2).sum(axis=1)


def _tilted(atoms: Atoms, s: float) -> tuple[np.ndarray, np.ndarray]:
    """(weights [E, n] of the law tilted by s, summing to 1; log G(s) [E])."""
    weights = atoms.log_mass + s * atoms.loss
    top = weights.max(axis=1, keepdims=True)
    weights = np.exp(weights - top)
    total = weights.sum(axis=1, keepdims=True)
    return weights / total, (top + np.log(total))[:, 0]


def _root(f: Callable[[float], float], low: float, high: float) -> float:
    """Where the decreasing f crosses 0, to 1e-3: regula falsi that halves the weight of an end that stays."""
    left, right = f(low), f(high)
    side = 0
    for _ in range(60):
        x = (low * right - high * left) / (right - left)
        value = f(x)
        if value > 0.0:
            low, left, right, side = x, value, 0.5 * right if side == 1 else right, 1
        else:
            high, right, left, side = x, value, 0.5 * left if side == -1 else left, -1
        if high - low < 1e-3 or abs(value) < 1e-6:
            break
    return x


_TILTS = np.array([1.0, 0.8, 0.6, 0.45, 0.3])
_ALIASES = np.array([1.15, 1.3, 1.6, 2.0, 3.0, 5.0])
