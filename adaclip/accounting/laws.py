"""Atomic laws, upper and lower, of releases that are not Poisson-subsampled Gaussians under add/remove adjacency."""

from __future__ import annotations

import functools
import math

import numpy as np
from scipy.special import ndtri

from adaclip.accounting.atoms import Atoms
from adaclip.accounting.gaussian import gaussian_log_delta, log_cell_masses, sampled_loss
from adaclip.accounting.mixtures import EPS

_CELLS = 3000


def approximate_law(epsilon: float, delta: float) -> Atoms:
    """Upper law of any (ε, δ)-DP release: randomized response, and with probability δ everything.

    Kairouz, Oh, Viswanath 2015, arXiv 1311.0776, theorem 3.4: it dominates every (ε, δ)-DP mechanism.
    """
    stay, turn = -np.logaddexp(0.0, -epsilon), -np.logaddexp(0.0, epsilon)
    log_mass = np.array([stay, turn]) + math.log1p(-delta)
    loss = np.array([-epsilon, epsilon])
    return _law(log_mass, loss, np.full(2, 16.0 * EPS), delta)


@functools.lru_cache(maxsize=64)
def laplace_law(scale: float) -> tuple[Atoms, Atoms]:
    """(upper, lower) laws of Laplace noise of that scale per unit of sensitivity.

    Under Q = Laplace(0, b) the loss of P = Laplace(1, b) at y is (|y| − |y − 1|)/b: ±1/b outside [0, 1], linear
    within it, where the cells lie.
    """
    a = 1.0 / scale
    y = np.linspace(0.0, 1.0, _CELLS + 1)
    left, right = y[:-1], y[1:]
    # ∫ (a/2)·e^{−ay} over a cell, and its mirror image for P.
    log_width = np.log(-np.expm1(-a * (right - left)))
    log_q = -a * left + math.log(0.5) + log_width
    log_p = -a * (1.0 - right) + math.log(0.5) + log_width
    ends_q = np.array([math.log(0.5), math.log(0.5) - a])
    error = np.full(_CELLS + 2, EPS * (64.0 + 8.0 * _CELLS + 4.0 * a))
    lower = _law(np.append(ends_q, log_q), np.concatenate([[-a, a], log_p - log_q]), error)
    edge = a * (2.0 * y - 1.0)
    mean = log_p - log_q
    up = np.clip(np.expm1(mean - edge[:-1]) / np.expm1(edge[1:] - edge[:-1]), 0.0, 1.0)
    mass = np.zeros(_CELLS + 1)
    mass[1:] += np.exp(log_q) * up
    mass[:-1] += np.exp(log_q) * (1.0 - up)
    mass[0] += 0.5
    mass[-1] += 0.5 * math.exp(-a)
    upper = _law(np.log(mass), edge, np.full(_CELLS + 1, 4.0 * error[0]))
    return upper, lower


@functools.lru_cache(maxsize=256)
def replacement_law(q: float, mu: float, lost: float) -> tuple[Atoms, Atoms]:
    """(upper, lower) laws of a Poisson-subsampled Gaussian step under replace-one adjacency.

    P = (1 − q)·N(0, 1) + q·N(μ, 1) against Q = (1 − q)·N(0, 1) + q·N(−μ, 1), which dominates in any dimension: with
    contributions g and g' of norm at most C and E any event, let N(0, I)(E) = Φ(−c); then by Neyman and Pearson
    N(g, I)(E) ≤ Φ(μ − c) and N(g', I)(E) ≥ Φ(−μ − c), and the half-line beyond c attains both for this pair. Each
    hockey-stick divergence is such a sum, so none is larger than this pair's.

    Losses of probability about ``lost`` are taken for infinite (upper) or left out (lower).
    """
    reach = mu - float(ndtri(min(lost, 0.1)))
    edges = np.linspace(-reach, reach, _CELLS + 1)
    rest = math.log1p(-q)
    loss = np.logaddexp(rest, math.log(q) + mu * edges - 0.5 * mu * mu)
    loss -= np.logaddexp(rest, math.log(q) - mu * edges - 0.5 * mu * mu)
    base = rest + log_cell_masses(edges)
    log_p = np.logaddexp(base, math.log(q) + log_cell_masses(edges - mu))
    log_q = np.logaddexp(base, math.log(q) + log_cell_masses(edges + mu))
    mean = log_p - log_q
    moved = 8.0 * EPS * (1.0 + np.abs(log_p) + np.abs(log_q))
    error = EPS * (64.0 + 4.0 * reach * reach)
    inner = slice(1, -1)
    lower = _law(log_q[inner], mean[inner], np.full(_CELLS, error), moved=moved[inner])
    # Shares of each cell that go to its right end; the first cell begins at a likelihood ratio of 0.
    right = np.expm1(mean[inner] - loss[:-1]) / np.expm1(loss[1:] - loss[:-1])
    right = np.concatenate([np.exp(mean[:1] - loss[:1]), right, [0.0]]).clip(0.0, 1.0)
    mass = np.exp(log_q[:-1]) * right[:-1] + np.exp(log_q[1:]) * (1.0 - right[1:])
    beyond = float(np.exp(log_p[-1])) * (1.0 + 1e-6)
    upper = _law(
        np.log(mass), loss, np.full(_CELLS + 1, error), beyond, moved=np.maximum(moved[:-1], moved[1:])
    )
    return upper, lower


@functools.lru_cache(maxsize=256)
def fixed_size_law(q: float, mu: float, shift: float, lost: float) -> tuple[Atoms, Atoms]:
    """(upper, lower) laws of a step on qN examples drawn without replacement, the data sets being of equal size.

    Given everything else, the batch without the example is N(0, σ²), with it N(a, σ²), and with what stands in its
    place N(b, σ²), where a and b are up to 2C from 0 (another example made room) and ``shift``·C from each other: 2
    under replace_one, 1 under zero_out. Upper, by advanced joint convexity (Balle, Barthe, Gaboardi 2018, arXiv
    1807.01647, theorem 2), with e^{ε'} = 1 + q(e^ε − 1), β = e^{ε' − ε} and δ_d the profile at shift d:

        δ'(ε') ≤ q·((1 − β)·δ_2(ε) + β·δ_shift(ε)),

    for either order of the two data sets, so the law is symmetric. Lower: data sets with a = 2, b = 2 − shift.

    Losses of probability about ``lost`` are taken for infinite (upper) or left out (lower).
    """
    reach = -float(ndtri(min(lost / q, 0.1)))
    return _convexity_upper(q, mu, 2.0, shift, reach), _pair_lower(q, mu, 2.0, 2.0 - shift, reach)


def _convexity_upper(q: float, mu: float, shift0: float, shift1: float, reach: float) -> Atoms:
    far = max(shift0, shift1) * mu
    z = np.linspace(0.0, far * (0.5 * far + reach), _CELLS + 1)
    loss = np.array([sampled_loss(q, value) for value in z])
    share = np.exp(loss - z)
    profile = q * (
        (1.0 - share) * np.exp(gaussian_log_delta(z, shift0 * mu))
        + share * np.exp(gaussian_log_delta(z, shift1 * mu))
    )
    # In units of q: u = 1 + q·w', so that nothing cancels for small q.
    w = np.expm1(z)
    keep = _convex_minorant(w, profile / q)
    w, height, loss = w[keep], profile[keep] / q, loss[keep]
    slope = np.append(np.diff(height) / np.diff(w), 0.0)
    mass = np.diff(slope)  # Q-mass at nodes 1…; that of node 0 is what is left
    rounding = 64.0 * EPS * (height[:-1] / np.diff(w))
    error = (rounding + np.append(rounding[1:], 0.0)) / np.maximum(mass, 1e-300)
    right = np.log(np.maximum(mass, 1e-300))
    infinite = profile[keep][-1]
    middle = 1.0 - np.sum(mass * (1.0 + np.exp(loss[1:]))) - infinite
    log_mass = np.concatenate([right, right + loss[1:], [math.log(max(middle, 1e-300))]])
    position = np.concatenate([loss[1:], -loss[1:], [0.0]])
    error = np.concatenate([error, error, [64.0 * EPS * len(mass) / max(middle, 1e-300)]])
    return _law(log_mass, position, error, infinite * (1.0 + 1e-9))


def _convex_minorant(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Indices of the corners of the greatest convex function below the points, x ascending."""
    corners: list[int] = []
    for i in range(len(x)):
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            if (y[b] - y[a]) * (x[i] - x[b]) < (y[i] - y[b]) * (x[b] - x[a]):
                break
            corners.pop()
        corners.append(i)
    return np.array(corners)


def _pair_lower(q: float, mu: float, a: float, b: float, reach: float) -> Atoms:
    edges = np.linspace(min(0.0, b * mu) - reach, a * mu + reach, _CELLS + 1)
    base = math.log1p(-q) + log_cell_masses(edges)
    log_p = np.logaddexp(base, math.log(q) + log_cell_masses(edges - a * mu))
    log_q = np.logaddexp(base, math.log(q) + log_cell_masses(edges - b * mu))
    size = np.abs(np.append(edges[0], edges)) + (abs(a) + abs(b)) * mu
    error = EPS * (16.0 + 2.0 * size * size + (48.0 + 4.0 * size) / (edges[1] - edges[0]))
    inner = slice(1, -1)
    return _law(log_q[inner], (log_p - log_q)[inner], error[inner])


# Mass at infinite loss lies on either side: these laws are symmetric.
def _law(
    log_mass: np.ndarray,
    loss: np.ndarray,
    error: np.ndarray,
    infinite: float = 0.0,
    moved: np.ndarray | None = None,
) -> Atoms:
    moved = 4.0 * EPS * np.abs(loss) + (error if moved is None else moved)
    beyond = np.array([infinite])
    return Atoms(
        log_mass[None], loss[None], error[None], moved[None], np.zeros((1, len(loss))), beyond, beyond
    )
