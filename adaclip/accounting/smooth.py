"""Certified δ(ε) of composed subsampled Gaussian steps by their exact moment functions.

The integral is that of ``transform``,

    δ(ε) = 1/(2π) ∫ G(s) e^{ε(1−s)} / (s(s − 1)) dω,     s = 1 + λ + iω,

but nothing is discretized: G is computed by quadrature to rounding (``quadrature``), and where many steps are composed
it falls so fast that the sum can be cut off with a bound on all that is beyond (``decay``). Upper and lower bound are
one number and its error, and lie as close together as rounding lets them: there is no accuracy to trade for time.
Where G does not fall, or tilting cannot separate rare large losses from the others, ``transform`` and ``jumps`` take
over.

The trapezoidal rule with spacing 2π/W adds Σ_{m≠0} e^{λmW} δ(ε + mW), all ≥ 0; Chernoff's inequality bounds it.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import numpy as np

from adaclip.accounting.decay import Decay
from adaclip.accounting.mixtures import EPS, Mixtures
from adaclip.accounting.quadrature import Placed, Rule
from adaclip.accounting.solve import solve
from adaclip.accounting.transform import Contour, characteristic, power_rounding

_TOLERANCE = 1e-7  # of ε, relative: a hundredth of how far apart the bounds are
_TABLE = 1e5  # numbers in a chunk's tables


class Course(NamedTuple):
    """A contour without damping, the quadrature along it, and which direction is composed.

    Attributes:
        contour, rule: where to evaluate.
        bottom, far: ends of the noise that is kept, see ``quadrature.ends``.
        swapped: the direction that adds an example.
    """

    contour: Contour
    rule: Rule
    bottom: float
    far: float
    swapped: bool

    def place(self, law: Mixtures) -> Placed:
        """Events on the course's nodes."""
        return Placed.of(law, self.rule, self.bottom, self.far)

    def exponent(self, s: float) -> float:
        """E_Q[u^a] is the moment function at s: a = s, or 1 − s for the direction that adds an example."""
        return 1.0 - s if self.swapped else s


class Factors(NamedTuple):
    """Moment functions of E events along a course, for one copy of each.

    Attributes:
        log_values: [E, count] complex logarithm of G(s + iω)/G(s).
        log_bounds: [E, count] log of an upper bound on its modulus, and of the true one.
        errors: [E, count] error relative to that bound.
        log_total: [E] log G(s).
        rounding: [E] relative error of G(s).
        log_alias: [E] log of an upper bound on G at the alias.
        log_beyond: [E] log of an upper bound on |G|/G(s) at all further frequencies.
        outside: [E] probability that is left out.
    """

    log_values: np.ndarray
    log_bounds: np.ndarray
    errors: np.ndarray
    log_total: np.ndarray
    rounding: np.ndarray
    log_alias: np.ndarray
    log_beyond: np.ndarray
    outside: np.ndarray


def factors(placed: Placed, course: Course) -> Factors:
    """The moment functions of all events along a course."""
    contour, swapped = course.contour, course.swapped
    law, low, high, nodes, bounds, (log_p, log_q) = placed
    a, omega = course.exponent(contour.s), contour.frequencies()
    weights, log_total = nodes.tilted(a)
    integral = np.exp(np.minimum(bounds.log_error(a, omega[-1]) - log_total, 600.0))
    moved = (weights * nodes.moved).sum(axis=1)
    rounding = nodes.rounding(weights, a)
    error = (integral + rounding)[:, None] + moved[:, None] * omega
    spread = (weights * np.abs(nodes.loss)).sum(axis=1, keepdims=True)
    error += EPS * (2.0 * weights.shape[1] + 64.0 + power_rounding(contour.count) + 4.0 * spread * omega)
    values = np.concatenate(
        [
            characteristic(weights[rows], nodes.loss[rows], contour)
            for rows in _chunks(*weights.shape, contour.count)
        ]
    )
    modulus = np.abs(values)
    largest = modulus + error
    log_values = np.log(np.maximum(modulus, 1e-300)) + 1j * np.arctan2(values.imag, values.real)
    b = course.exponent(contour.alias)
    log_alias = nodes.log_upper(b, bounds.log_error(b, 0.0))
    deficit = Decay.of(law, low, high, a, log_total).deficit(omega[-1])
    return Factors(
        np.conj(log_values) if swapped else log_values,
        np.log(largest),
        2.0 * error / largest + 8.0 * EPS,
        log_total,
        integral + rounding,
        log_alias,
        np.log1p(np.minimum(integral + rounding, 1.0) - deficit),
        np.exp(log_q if swapped else log_p) * (1.0 + 1e-9) + 1e-300,
    )


def _chunks(rows: int, nodes: int, count: int) -> list[slice]:
    size = max(1, int(_TABLE / (nodes * math.sqrt(count) + count)))
    return [slice(start, start + size) for start in range(0, rows, size)]


class Smooth:
    """δ(ε) of a growing composition along a course, with its error."""

    def __init__(self, course: Course) -> None:
        self.course = course
        count = course.contour.count
        self._log_values = np.zeros(count, dtype=np.complex128)
        self._log_bounds = np.zeros(count)
        self._errors = np.zeros(count)
        self._log_total = self._rounding = self._log_alias = self._log_beyond = 0.0
        self._outside = self._overflow = self._gauss = 0.0
        self._sum: tuple[np.ndarray, np.ndarray, float] | None = None  # _terms(), until the next add

    def add(self, factors: Factors, counts: np.ndarray) -> None:
        """Compose ``counts`` [E] copies of each event."""
        counts = np.asarray(counts, dtype=np.float64)
        self._log_values = self._log_values + counts @ factors.log_values
        self._log_bounds = self._log_bounds + counts @ factors.log_bounds
        self._errors = self._errors + counts @ factors.errors
        self._log_total += float(counts @ factors.log_total)
        self._rounding += float(counts @ (factors.rounding + EPS * (4.0 + np.abs(factors.log_total))))
        self._log_alias += float(counts @ factors.log_alias)
        self._log_beyond += float(counts @ factors.log_beyond)
        self._outside += float(counts @ factors.outside)
        self._sum = None

    def add_gaussian(self, mu_squared: float) -> None:
        """Compose a Gaussian pair N(μ, 1), N(0, 1)."""
        self._gauss += mu_squared
        self._sum = None

    def add_overflow(self, probability: float) -> None:
        """Let the releases differ from those composed with at most this probability, on either data set."""
        self._overflow += probability

    def copy(self) -> Smooth:
        """The composition so far, to be continued in another way."""
        return copy.copy(self)

    def epsilon_bounds(self, delta: float, start: float) -> tuple[float, float]:
        """(lower, upper) on ε at δ, looked for from ``start`` on; (0, 0) or (0, inf) where there is none."""
        upper = solve(_Side(self, upper=True), delta, start, _TOLERANCE)
        return solve(_Side(self, upper=False), delta, min(upper, 1e300), _TOLERANCE), upper

    def delta(self, epsilon: float, *, upper: bool) -> tuple[float, float]:
        """(bound on δ(ε) within [0, 1], derivative of the main term in ε)."""
        contour = self.course.contour
        if self._sum is None:
            self._sum = self._terms()
        terms, omega, error = self._sum
        lam = contour.s - 1.0
        log_scale = self._log_total + 0.5 * self._gauss * contour.s * lam - lam * epsilon
        scale = math.exp(min(log_scale, 700.0))
        turn = np.exp(-1j * epsilon * omega) * terms
        total = float(turn.real.sum())
        slope = -scale * float((turn * (lam + 1j * omega)).real.sum())
        error = error + EPS * float((np.abs(terms) * (4.0 + len(terms) + abs(epsilon) * omega)).sum())
        size = abs(self._log_total) + self._gauss * contour.s * lam + lam * epsilon
        slack = self._rounding + EPS * (16.0 + 2.0 * size)
        overflow = self._overflow * (1.0 + math.exp(min(epsilon, 700.0)))
        if upper:
            value = scale * (total + error) * math.exp(min(slack, 700.0)) + self._outside + overflow
        else:
            value = scale * (total - error) * math.exp(-slack) - self._alias(epsilon) - overflow
        if math.isnan(value):
            return (1.0, 0.0) if upper else (0.0, 0.0)
        return min(max(value, 0.0), 1.0), slope

    def _terms(self) -> tuple[np.ndarray, np.ndarray, float]:
        """(terms of the sum without e^{−iωε}, their frequencies, error), all without the scale."""
        contour = self.course.contour
        omega = contour.frequencies()
        fade = -0.5 * self._gauss * omega * omega
        s = contour.s + 1j * omega
        kernel = (omega[1] / math.pi) / (s * (s - 1.0))
        kernel[0] *= 0.5
        bound = np.exp(np.minimum(self._log_bounds + fade, 600.0)) * np.abs(kernel)
        angle = 0.5 * self._gauss * (2.0 * contour.s - 1.0) * omega
        size = np.abs(self._log_values.imag) + 4.0 * np.abs(angle) + 4.0 * np.abs(fade)
        errors = np.minimum(self._errors + EPS * (8.0 + size), 2.0)
        turn = fade + 1j * angle
        terms = np.exp(np.minimum(self._log_values.real, 600.0) + 1j * self._log_values.imag + turn) * kernel
        last = float(omega[-1])
        beyond = math.exp(min(self._log_beyond, 600.0) + float(fade[-1])) / (math.pi * last)
        return terms, omega, float(bound @ errors) + beyond

    def _alias(self, epsilon: float) -> float:
        """What the neighboring windows add, at most."""
        s, a, window = self.course.contour[:3]
        left = 1.0 / math.expm1(min((s - 1.0) * window, 700.0))
        log_right = self._log_alias + 0.5 * self._gauss * a * (a - 1.0) - (a - 1.0) * epsilon
        log_right += (a - 1.0) * math.log(a - 1.0) - a * math.log(a)
        log_right -= math.log(math.expm1(min((a - s) * window, 700.0)))
        return left + math.exp(min(log_right, 700.0))


class _Side:
    """One of the two bounds, as ``solve`` wants it."""

    def __init__(self, smooth: Smooth, *, upper: bool) -> None:
        self._smooth, self.upper = smooth, upper

    def delta(self, epsilon: float) -> tuple[float, float]:
        return self._smooth.delta(epsilon, upper=self.upper)
