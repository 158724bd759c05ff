"""Rényi differential privacy (RDP) of every kind of release, and what a composition of them implies.

| release | RDP at order α |
|---|---|
| Poisson sampling, add_remove and zero_out | ``adaclip.accounting.rdp`` |
| every example in the batch, contributions moving by d·C | d²α/(2σ²) |
| Poisson sampling, replace_one | ``adaclip.accounting.replacement`` |
| fixed-size batches | ``adaclip.accounting.sampled_profile`` |
| Laplace | Mironov 2017, arXiv 1702.07476, proposition 6 |
| (ε, 0)-private | that of randomized response, whose post-processing every such release is (Kairouz, Oh, Viswanath 2015, arXiv 1311.0776) |
| (ε, δ)-private | the same, outside an event of probability δ (the same source) |

d is 1 for zero_out and 2 for replace_one. Values of RDP add up over releases; so do the probabilities δ of the last row.
Truncated Poisson batches are distributed as Poisson batches except with probability ``overflow``, on either of two
neighbors, which costs (1 + e^ε)·overflow in δ (Chua et al. 2024, arXiv 2411.04205).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

from adaclip.accounting.rdp import (
    DEFAULT_ORDERS,
    gaussian_rdp,
    least_epsilon,
    log_delta_curve,
    subsampled_gaussian_rdp,
)
from adaclip.accounting.releases import (
    ApproximateDP,
    Event,
    Laplace,
    PureDP,
    Release,
    SubsampledGaussian,
    is_noiseless,
    is_silent,
)
from adaclip.accounting.replacement import replacement_rdp
from adaclip.accounting.sampled_profile import sampled_profile_rdp

_ROUNDING = 1.0 + 1e-9
_SUM = 1.0 + 1e-12  # rounding of sums of δ


def release_rdp(release: Release, adjacency: str, orders: np.ndarray = DEFAULT_ORDERS) -> np.ndarray:
    """RDP of one release that has a guarantee under ``adjacency``.

    Args:
        release: a checked release.
        adjacency: one of ``releases.ADJACENCIES``.
        orders: float array [n], each > 1 and finite.

    Returns:
        float64 array [n], never below the true value; inf for a noiseless release. Read-only and cached for
        ``DEFAULT_ORDERS``.
    """
    if orders is DEFAULT_ORDERS:
        return _cached(release, adjacency)
    return _rdp(release, adjacency, np.asarray(orders, dtype=np.float64))


@functools.lru_cache(maxsize=1024)
def _cached(release: Release, adjacency: str) -> np.ndarray:
    rdp = _rdp(release, adjacency, DEFAULT_ORDERS)
    rdp.setflags(write=False)
    return rdp


def _rdp(release: Release, adjacency: str, orders: np.ndarray) -> np.ndarray:
    if is_silent(release):
        return np.zeros_like(orders)
    if is_noiseless(release):
        return np.full_like(orders, np.inf)
    if isinstance(release, Laplace):
        return _laplace(1.0 / release.scale, orders)
    if isinstance(release, PureDP | ApproximateDP):
        return _randomized_response(release.epsilon, orders)
    q, sigma = release.q, release.sigma
    if q == 1.0:
        return gaussian_rdp(sigma, orders, shift=2.0 if adjacency == "replace_one" else 1.0)
    if release.sampling == "fixed_size":
        # Whoever is drawn in the example's place moves the sum by up to 2C.
        return sampled_profile_rdp(q, sigma, 2.0, 2.0 if adjacency == "replace_one" else 1.0, orders)
    if adjacency == "replace_one":
        return replacement_rdp(q, sigma, orders)
    return np.array(subsampled_gaussian_rdp(q, sigma, None if orders is DEFAULT_ORDERS else orders))


def _randomized_response(epsilon: float, orders: np.ndarray) -> np.ndarray:
    """log(1 + (e^{αε} − 1)(1 − e^{−(α−1)ε})/(1 + e^ε))/(α − 1); at most ε."""
    if epsilon == 0.0:
        return np.zeros_like(orders)
    above, below = orders * epsilon, (orders - 1.0) * epsilon
    # log(e^x − 1) without overflow; every factor keeps its relative accuracy for tiny ε.
    log_excess = above + np.log(-np.expm1(-above)) + np.log(-np.expm1(-below)) - np.logaddexp(0.0, epsilon)
    return np.minimum(np.logaddexp(0.0, log_excess) / (orders - 1.0) * _ROUNDING, epsilon)


def _laplace(rate: float, orders: np.ndarray) -> np.ndarray:
    """log((α e^{(α−1)r} + (α−1) e^{−αr})/(2α−1))/(α − 1), r = 1/scale; at most r."""
    above, below, total = (orders - 1.0) * rate, orders * rate, 2.0 * orders - 1.0
    with np.errstate(over="ignore"):
        # The terms of first order cancel: A − 1 = (α f((α−1)r) + (α−1) f(−αr))/(2α−1), f(x) = e^x − 1 − x ≥ 0.
        excess = (orders * _exp_excess(above) + (orders - 1.0) * _exp_excess(-below)) / total
        large = np.logaddexp(np.log(orders / total) + above, np.log((orders - 1.0) / total) - below)
    log_a = np.where(above < 1.0, np.log1p(excess), large)
    return np.minimum(log_a / (orders - 1.0) * _ROUNDING, rate)


def _exp_excess(x: np.ndarray) -> np.ndarray:
    """e^x − 1 − x, to about 1e-14 relative."""
    small = np.where(np.abs(x) < 0.1, x, 0.0)
    term = series = 0.5 * small * small
    for k in range(3, 12):
        term = term * small / k
        series = series + term
    return np.where(np.abs(x) < 0.1, series, np.expm1(x) - x)


class Curve(NamedTuple):
    """What a composition is known to satisfy.

    Attributes:
        rdp: float64 [n], RDP of the composition without what follows, at ``DEFAULT_ORDERS`` where nothing else is said.
        delta: probability of the event outside of which ``rdp`` holds, for (ε, δ)-private releases.
        distance: total variation, on each of two neighbors, between the releases that ``rdp`` is about and those made.
    """

    rdp: np.ndarray
    delta: float = 0.0
    distance: float = 0.0

    def plus(self, event: Event, adjacency: str) -> Curve:
        """The curve of the composition followed by ``event``."""
        return self.with_rdp(event, release_rdp(event.release, adjacency))

    def with_rdp(self, event: Event, one: np.ndarray) -> Curve:
        """``plus``, given the RDP [n] of one of the event's releases."""
        release, count = event
        if is_silent(release):
            return self
        delta, distance = self.delta, self.distance
        if isinstance(release, ApproximateDP):
            delta += count * release.delta
        elif isinstance(release, SubsampledGaussian):
            distance += count * release.overflow
        return Curve(self.rdp + count * one, delta, distance)

    def epsilon(self, delta: float) -> float:
        """The least ε found at which the composition is (ε, δ)-private; inf if none."""
        if self.delta == 0.0 and self.distance == 0.0:
            return least_epsilon(self.rdp, delta)
        epsilon = 0.0
        # ε must be at least what is needed at the δ that ε itself leaves, which shrinks as ε grows: from below
        # this climbs to the least such ε, if there is one.
        for _ in range(200):
            left = delta - self.lost(epsilon)
            if not left > 0.0:
                return math.inf
            needed = least_epsilon(self.rdp, left)
            if needed <= epsilon:
                return epsilon
            epsilon = needed * (1.0 + 1e-9)
        return math.inf

    def log_delta(self, epsilon: float) -> float:
        """Upper bound on log δ at ε ≥ 0, at most 0."""
        bound = log_delta_curve(self.rdp, epsilon)
        lost = self.lost(epsilon)
        return min(0.0, float(np.logaddexp(bound, math.log(lost))) if lost else bound)

    def lost(self, epsilon: float) -> float:
        """The part of δ at ε that goes to what ``rdp`` does not cover."""
        if self.distance == 0.0:
            return self.delta * _SUM
        return (self.delta + (1.0 + math.exp(min(epsilon, 700.0))) * self.distance) * _SUM


EMPTY = Curve(np.zeros_like(DEFAULT_ORDERS))
