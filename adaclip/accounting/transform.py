"""Certified δ(ε) of composed atomic laws by a damped Laplace transform.

For a pair with moment function G(s) = E_Q[e^{sL}], composition multiplies the G, and for any real part
Re s = 1 + λ > 1

    δ(ε) = E_Q[(e^L − e^ε)₊] = 1/(2π) ∫ G(s) e^{ε(1−s)} / (s(s − 1)) dω,     s = 1 + λ + iω.

λ is put near the saddle point, where the integrand is largest relative to δ: that is an exponential tilt, and it
keeps full relative accuracy for δ = 1e-15 as for 1e-3. The laws are atomic and lie on no grid, so G need not fall
with ω; a Gaussian factor makes the integral finite, certified on both sides:

* composing with one more release N(τ, 1) against N(0, 1), whose moment function is exp(τ²(s² − s)/2), never
  lowers δ: an **upper** bound;
* it raises the integrand (e^L − e^ε)₊ by the time value of an option of total volatility τ, at most
  e^ε·e^{x/2}·τ·φ(x/τ) at L = ε + x (integrate its derivative in τ), and the transform of that is
  τ²·exp(τ²/8)·exp(τ²(s² − s)/2): subtracted, it leaves a **lower** bound.

The integral is summed by the trapezoidal rule with spacing 2π/W. By Poisson's formula the sum is δ(ε) plus
Σ_{m≠0} e^{λmW} δ(ε + mW): all ≥ 0, so an upper bound stays one; for a lower bound Chernoff's inequality bounds
what is subtracted. The cut at the last frequency and the rounding of every term are explicit, too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

from adaclip.accounting.atoms import Atoms
from adaclip.accounting.mixtures import EPS

_ONE_THREAD = 50_000  # multiplications of a product
_ROWS = 8  # of the left factor
_SHORT = 32  # longest table whose entries are each one product further than the last
_TABLE = 1e5  # numbers in a chunk's tables
_FADED = -60.0  # log of a term, relative to the largest, that is bounded and not summed


class Contour(NamedTuple):
    """Where the transform is evaluated.

    Attributes:
        s: Re s, > 1.
        alias: a second real part, > s, for Chernoff's inequality.
        window: W.
        count: how many frequencies, from 0 on.
        tau: τ ≥ 0 of the damping; 0 only where Gaussian releases damp enough.
    """

    s: float
    alias: float
    window: float
    count: int
    tau: float

    def frequencies(self) -> np.ndarray:
        """[count] ω_j = 2πj/W."""
        return (2.0 * math.pi / self.window) * np.arange(self.count)


class Tilted(NamedTuple):
    """Laws tilted by s: masses times e^{s·loss}.

    Attributes:
        weights: [E, n], summing to 1.
        loss: [E, n].
        log_total: [E] log G(s).
        rounding: [E] relative rounding of G(s + iω), for every ω, but for that of the sum and of the angles.
        moved: [E] mean rounding of the losses, which turns the terms by ω times as much.
    """

    weights: np.ndarray
    loss: np.ndarray
    log_total: np.ndarray
    rounding: np.ndarray
    moved: np.ndarray

    @classmethod
    def of(cls, atoms: Atoms, s: float) -> Tilted:
        weights = atoms.log_mass + s * atoms.loss
        top = weights.max(axis=1, keepdims=True)
        weights = np.exp(weights - top)
        total = weights.sum(axis=1, keepdims=True)
        weights /= total
        rounding = (weights * (atoms.error + s * atoms.moved + s * s * atoms.bent)).sum(axis=1)
        size = np.abs(top[:, 0]) + s * np.abs(atoms.loss * weights).sum(axis=1)
        rounding += EPS * (8.0 + weights.shape[1] + size)
        return cls(
            weights, atoms.loss, (top + np.log(total))[:, 0], rounding, (weights * atoms.moved).sum(axis=1)
        )


class Composed:
    """The transform of a growing composition along one contour, upper or lower, one direction.

    Args:
        contour: where to evaluate.
        upper: which bound; decides the kernel and the sign of every error term.
    """

    def __init__(self, contour: Contour, *, upper: bool) -> None:
        self.contour = contour
        self.upper = upper
        self._log_moment = 0.0  # log G at ω = 0
        self._log_bound = np.zeros(contour.count)  # log |G / G(0)|, rounding included
        self._phase = np.zeros(contour.count)
        self._relative = np.zeros(contour.count)  # rounding of G, relative to exp(_log_bound)
        self._slack = 0.0  # relative rounding of G(0)
        self._infinite = 0.0
        self._overflow = 0.0
        self._gauss = 0.0  # μ² of the Gaussian releases
        self._log_alias = 0.0  # log G(contour.alias)
        self._sum: tuple[np.ndarray, np.ndarray, float, float] | None = None  # _terms(), until the next add

    def add(self, atoms: Atoms, counts: np.ndarray) -> None:
        """Compose ``counts`` [E] copies of each event's law."""
        counts = np.asarray(counts, dtype=np.float64)
        tilted = Tilted.of(atoms, self.contour.s)
        self._add_moments(atoms, counts, tilted)
        for rows in self._chunks(tilted):
            values, error = self._values(tilted, rows)
            self._multiply(values, np.abs(values) + error, error, counts[rows])

    def _add_moments(self, atoms: Atoms, counts: np.ndarray, tilted: Tilted) -> None:
        """What the law adds at ω = 0."""
        self._sum = None
        self._log_moment += float(counts @ tilted.log_total)
        self._slack += float(counts @ tilted.rounding)
        self._infinite += float(counts @ atoms.infinite)
        self._log_alias += float(counts @ logsumexp(atoms.log_mass + self.contour.alias * atoms.loss, axis=1))

    def _multiply(self, values: np.ndarray, bound: np.ndarray, error: np.ndarray, counts: np.ndarray) -> None:
        """Multiply by values^counts, [E, count], known to ``error``."""
        if (counts == 1.0).all():
            # One logarithm for the product of all; where it underflows the bound stays one.
            self._log_bound += np.log(np.maximum(bound.prod(axis=0), 1e-300))
            product = values.prod(axis=0)
            self._phase += np.arctan2(product.imag, product.real)
        else:
            self._log_bound += counts @ np.log(bound)
            self._phase += counts @ np.arctan2(values.imag, values.real)
        self._relative += counts @ (2.0 * error / bound + 8.0 * EPS)

    def _chunks(self, tilted: Tilted) -> list[slice]:
        """Events in groups whose tables take a few megabytes."""
        rows, atoms = tilted.weights.shape
        size = max(1, int(_TABLE / (atoms * math.sqrt(self.contour.count) + self.contour.count)))
        return [slice(start, start + size) for start in range(0, rows, size)]

    def _values(self, tilted: Tilted, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """(Σ_k weights_k e^{iω_j loss_k}, its rounding), both [E, count]."""
        weights, loss = tilted.weights[rows], tilted.loss[rows]
        spread = (weights * np.abs(loss)).sum(axis=1, keepdims=True)
        size = weights.sum(axis=1, keepdims=True)
        error = tilted.rounding[rows, None] * size
        powers = power_rounding(self.contour.count)
        error = error + EPS * (
            size * (2.0 * weights.shape[1] + 64.0 + powers) + 4.0 * spread * self.contour.frequencies()
        )
        error += size * tilted.moved[rows, None] * self.contour.frequencies()
        return characteristic(weights, loss, self.contour), error

    def add_gaussian(self, mu_squared: float) -> None:
        """Compose a Gaussian pair N(μ, 1), N(0, 1): exact."""
        self._gauss += mu_squared
        self._sum = None

    def add_overflow(self, probability: float) -> None:
        """Let the releases differ from those composed with at most this probability, on either data set."""
        self._overflow += probability

    def delta(self, epsilon: float) -> tuple[float, float]:
        """(bound on δ(ε), derivative of its main term in ε); the bound is within [0, 1]."""
        c = self.contour
        log_scale = self._log_scale(epsilon)
        if self._sum is None:
            self._sum = self._terms()
        terms, weight, error, cut = self._sum
        with np.errstate(over="ignore"):
            scale = math.exp(min(log_scale, 700.0))
        with np.errstate(over="ignore", invalid="ignore"):
            turn = np.exp(-1j * epsilon * weight) * terms
            total = float(turn.real.sum())
            slope = -float((turn * (c.s - 1.0 + 1j * weight)).real.sum())
        over = c.s - 1.0
        size = abs(self._log_moment) + (c.tau * c.tau + self._gauss) * c.s * over + over * epsilon
        slack = self._slack + EPS * (16.0 + 2.0 * size + len(terms))
        with np.errstate(over="ignore", invalid="ignore"):
            margin = error + cut + EPS * float((np.abs(terms) * (4.0 + abs(epsilon) * weight)).sum())
        overflow = self._overflow * (1.0 + math.exp(min(epsilon, 700.0)))
        if self.upper:
            # (1 + x)^n ≤ e^{nx}: what each step's rounding can do to the whole.
            value = scale * (total + margin) * math.exp(min(slack, 700.0)) + self._infinite + overflow
        else:
            value = scale * (total - margin) * math.exp(-slack) - self._alias(epsilon) - overflow
        if math.isnan(value):  # a plan so bad that terms overflow: nothing is known
            return (1.0, 0.0) if self.upper else (0.0, 0.0)
        return min(max(value, 0.0), 1.0), scale * slope

    def curvature(self, epsilon: float) -> float:
        """d²δ/dε² of the main term; not certified."""
        self.delta(epsilon)
        terms, weight, _, _ = self._sum
        rate = self.contour.s - 1.0 + 1j * weight
        with np.errstate(over="ignore", invalid="ignore"):
            main = float((np.exp(-1j * epsilon * weight) * terms * rate * rate).real.sum())
        return math.exp(min(self._log_scale(epsilon), 700.0)) * main

    def _log_scale(self, epsilon: float) -> float:
        c = self.contour
        damping = c.tau * c.tau + self._gauss
        return self._log_moment + 0.5 * damping * c.s * (c.s - 1.0) - (c.s - 1.0) * epsilon

    def log_scale(self, epsilon: float) -> float:
        """log of the integrand at ω = 0, which rounding is relative to."""
        s = self.contour.s
        return self._log_scale(epsilon) + math.log(max(self._sizes()[1], 1e-300)) - math.log(s * (s - 1.0))

    def _terms(self) -> tuple[np.ndarray, np.ndarray, float, float]:
        """(terms of the sum without e^{−iωε}, their frequencies, rounding, what is cut), all without the scale."""
        c = self.contour
        omega = c.frequencies()
        step = omega[1] if c.count > 1 else 2.0 * math.pi / c.window
        damping = c.tau * c.tau + self._gauss
        fade = -0.5 * damping * omega * omega
        log_size, reach = self._sizes()
        alive = log_size + fade > _FADED
        s = c.s + 1j * omega
        kernel = 1.0 / (s * (s - 1.0))
        bump = 0.0 if self.upper else c.tau * c.tau * math.exp(c.tau * c.tau / 8.0)
        kernel = kernel - bump
        weights = np.full(c.count, step / math.pi)
        weights[0] *= 0.5
        bound = np.exp(np.minimum(log_size + fade, 600.0)) * np.abs(kernel) * weights
        angle = 0.5 * damping * (2.0 * c.s - 1.0) * omega
        rounding = self._rounding() + 4.0 * EPS * (angle - fade)
        error = float((bound * np.minimum(rounding, 2.0))[alive].sum())
        error += 2.0 * float(bound[~alive].sum())
        # All frequencies beyond the last: |G(s)| ≤ G(Re s), a decreasing integrand against its integral.
        last = float(omega[-1])
        cut = reach * math.exp(-0.5 * damping * last * last) / (math.pi * damping * last) * (last**-2 + bump)
        turn = np.exp(fade + 1j * angle)
        terms = (self._product() * turn * kernel * weights)[alive]
        return terms, omega[alive], error, cut

    def _sizes(self) -> tuple[np.ndarray, float]:
        """(log of a bound on |G/G(0)| at each frequency, a bound at all others)."""
        return self._log_bound, 1.0

    def _rounding(self) -> np.ndarray:
        """Rounding of the product, relative to its bound."""
        return self._relative + EPS * (8.0 + np.abs(self._phase))

    def _product(self) -> np.ndarray:
        return np.exp(np.minimum(self._log_bound, 600.0) + 1j * self._phase)

    def _alias(self, epsilon: float) -> float:
        """What the neighboring windows add."""
        return self._alias_terms(epsilon, 1.0, self._log_alias)

    def _alias_terms(self, epsilon: float, largest: float, log_moment: float) -> float:
        """Σ_{m≠0} e^{λmW} δ(ε + mW) of a measure with δ ≤ ``largest`` and E_Q[e^{aL}] = e^{log_moment}."""
        c = self.contour
        damping, a = c.tau * c.tau + self._gauss, c.alias
        left = largest / math.expm1(min((c.s - 1.0) * c.window, 700.0))
        log_right = log_moment + 0.5 * damping * a * (a - 1.0) - (a - 1.0) * epsilon
        log_right += (a - 1.0) * math.log(a - 1.0) - a * math.log(a)
        log_right -= math.log(math.expm1(min((a - c.s) * c.window, 700.0)))
        return left + math.exp(min(log_right, 700.0))


def characteristic(weights: np.ndarray, loss: np.ndarray, contour: Contour) -> np.ndarray:
    """Σ_k weights_k e^{iω_j loss_k}, [E, count], as a product of two short tables of powers."""
    count = contour.count
    angle = (2.0 * math.pi / contour.window) * loss
    fine = _powers(angle, math.isqrt(count))
    inner = fine.shape[1]
    coarse = _powers(inner * angle, -(-count // inner))
    coarse *= weights[:, None, :]
    fine = fine.transpose(0, 2, 1)
    # Products this small run on one thread in OpenBLAS: starting its threads would cost more, and a hundred
    # times more where other work holds the cores.
    outer, atoms = coarse.shape[1:]
    if outer * inner * atoms <= _ONE_THREAD:
        return (coarse @ fine).reshape(len(weights), -1)[:, :count]
    fine = np.ascontiguousarray(fine)
    deep = max(1, _ONE_THREAD // (_ROWS * inner))
    values = np.zeros((len(weights), outer, inner), dtype=np.complex128)
    for k in range(0, atoms, deep):
        for row in range(0, outer, _ROWS):
            values[:, row : row + _ROWS] += coarse[:, row : row + _ROWS, k : k + deep] @ fine[:, k : k + deep]
    return values.reshape(len(weights), -1)[:, :count]


def power_rounding(count: int) -> float:
    """Rounding of each factor e^{iω_j loss} in ``characteristic``, in units of eps, but for that of the angle."""
    # Of two tables, or of four, whose entries are products of up to as many factors as they are long.
    return 8.0 * math.sqrt(count) if count <= _SHORT**2 else 16.0 * count**0.25


def _powers(angle: np.ndarray, count: int) -> np.ndarray:
    """e^{ij·angle}, [E, at least count, n] for angles [E, n]; a long table as products of two short ones."""
    if count <= _SHORT:
        return _table(angle, count)
    short = math.isqrt(count)
    long = -(-count // short)
    table = _table(short * angle, long)[:, :, None, :] * _table(angle, short)[:, None, :, :]
    return table.reshape(len(angle), long * short, -1)


def _table(angle: np.ndarray, count: int) -> np.ndarray:
    """e^{ij·angle} for j < count, [E, count, n], by repeated multiplication: j roundings, but few sines."""
    table = np.empty((len(angle), count, angle.shape[1]), dtype=np.complex128)
    table[:, 0] = 1.0
    if count > 1:
        np.cos(angle, out=table[:, 1].real)
        np.sin(angle, out=table[:, 1].imag)
    for j in range(2, count):
        np.multiply(table[:, j - 1], table[:, 1], out=table[:, j])
    return table
