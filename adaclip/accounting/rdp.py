"""Rényi differential privacy (RDP) of the Poisson-subsampled Gaussian mechanism.

One training step adds N(0, σ²) to a sum of vectors of norm ≤ 1 in which every example takes part
independently with probability q. Under add/remove adjacency its RDP at order α > 1 is ``log(A_α) / (α − 1)``
with

    A_α = E_{x~N(0,1)} [ L(x)^α ],    L(x) = 1 − q + q·exp(x/σ − 1/(2σ²))

(Mironov, Talwar, Zhang 2019, arXiv 1908.10530, theorems 4 and 5: the other direction is never worse). Steps
compose by adding their values at each order, also when later (q, σ) are chosen from earlier outputs.

Everything here is an upper bound. ``A_α − 1`` is formed from terms that are all ≥ 0, so nothing cancels
however small q/σ is:

* integer α: ``A_α − 1 = Σ_{k≥2} C(α,k) (1−q)^{α−k} q^k (exp(k(k−1)/(2σ²)) − 1)``, a finite sum;
* other α: the trapezoidal rule on ``E[L^α − 1 − α(L−1)]`` (E[L] = 1, and the integrand is ≥ 0 by convexity).
  The integrand is analytic in the strip |Im x| < πσ and |L(x+iy)| ≤ L(x), so the error is at most
  ``2·exp(a²/2)/(exp(2πa/h) − 1) · (A_α + 1 + 2α)`` for any a ≤ πσ and spacing h (Trefethen and Weideman 2014,
  theorem 5.1). h makes that < 1e-43; it is added to the result, and so are the two cut-off tails;
* when σ is so small that this needs too many nodes: the chord between the neighbouring integers, which lies
  above because α ↦ log A_α is convex.

Rounding is paid for by a factor 1 + 1e-9 on the result.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from scipy.special import gammaln

from adaclip.accounting import checks

_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)
_EXPONENT = 100.0  # the quadrature's error is about 2·exp(−_EXPONENT)
_REACH = 14.0  # nodes run from −_REACH to α/σ + _REACH standard deviations
_LOG_QUADRATURE_SLACK = math.log(2e-43)  # discretisation 2e^-100, left tail h·φ(14) + Φ(−14) < 6e-44
_MAX_NODES = 10_000
_CHUNK = 16  # orders a quadrature pass: [16, nodes] stays in cache
# Largest rounding: gammaln(16385) ≈ 1.4e5 is known to a few units of 1.4e5 · 2.2e-16 = 3e-11, which is the
# relative error of A − 1 and so, at worst, of its logarithm.
_ROUNDING = 1.0 + 1e-9


def _default_orders() -> np.ndarray:
    fractional = [
        1.0 + np.geomspace(0.001, 0.1, 30, endpoint=False),
        1.0 + np.geomspace(0.1, 1.0, 40, endpoint=False),
        np.arange(11, 120) / 10.0,  # Opacus's grid is a subset: never looser than it
        np.arange(41, 80, 2) / 20.0,
    ]
    integer = [np.arange(2, 65), np.round(np.geomspace(64, 16384, 73))]
    orders = np.unique(np.concatenate([*fractional, *integer]).astype(np.float64))
    orders.setflags(write=False)
    return orders


#: Orders every accountant composes at, ascending: dense and fractional in (1, 12), every integer up to 64,
#: then integers growing by 8 % up to 16,384. Small ε needs large orders: with these the least ε > 0 that can
#: be reported is below 1e-4 at δ = 1e-5 and about 7e-4 at δ = 1e-9.
DEFAULT_ORDERS: np.ndarray = _default_orders()


def subsampled_gaussian_rdp(q: float, sigma: float, orders: np.ndarray | None = None) -> np.ndarray:
    """RDP of one Poisson-subsampled Gaussian step, add/remove adjacency.

    Args:
        q: sampling rate, in [0, 1].
        sigma: noise multiplier (noise standard deviation / sensitivity), in [0, inf].
        orders: float array [n] of orders, each > 1 and finite; default ``DEFAULT_ORDERS``.

    Returns:
        float64 array [n], never below the true value (beyond it by about 1e-9 relative for σ ≥ 0.1);
        read-only and cached when ``orders`` is left out.

    | q | σ | value |
    |---|---|---|
    | 0 | any | 0 |
    | > 0 | 0 | inf |
    | any | inf | 0 |
    | 1 | in (0, inf) | α/(2σ²), exactly |

    Raises:
        ValueError, TypeError: q, sigma or an order out of range, nan, or no number.
    """
    q, sigma = checks.probability("q", q), checks.noise("sigma", sigma)
    return _cached(q, sigma) if orders is None else _rdp(q, sigma, _checked_orders(orders))


def _checked_orders(orders: object) -> np.ndarray:
    made = np.atleast_1d(checks.array("orders", orders, "an array of orders > 1"))
    if made.ndim != 1:
        raise ValueError(f"orders must be [n], got shape {made.shape}")
    bad = made[~((made > 1.0) & np.isfinite(made))]
    if bad.size:
        raise ValueError(f"orders must be > 1 and finite, got {float(bad[0])!r}")
    return made


@functools.lru_cache(maxsize=1024)
def _cached(q: float, sigma: float) -> np.ndarray:
    rdp = _rdp(q, sigma, DEFAULT_ORDERS)
    rdp.setflags(write=False)
    return rdp


def _rdp(q: float, sigma: float, orders: np.ndarray) -> np.ndarray:
    if q == 0.0 or math.isinf(sigma):
        return np.zeros_like(orders)
    if sigma * sigma == 0.0:
        return np.full_like(orders, np.inf)
    unsampled = gaussian_rdp(sigma, orders)
    if q == 1.0:
        return unsampled
    log_a = np.empty_like(orders)
    whole = orders == np.floor(orders)
    if whole.any():
        log_a[whole] = _log_a_integer(q, sigma, orders[whole])
    if not whole.all():
        log_a[~whole] = _log_a_fractional(q, sigma, orders[~whole])
    # Sampling never costs privacy (the divergence is quasi-convex): without this the bound at q → 1 would
    # exceed the value at q = 1 by the rounding factor.
    return np.minimum(log_a / (orders - 1.0) * _ROUNDING, unsampled)


def gaussian_rdp(sigma: float, orders: np.ndarray, shift: float = 1.0) -> np.ndarray:
    """RDP of N(shift, σ²) against N(0, σ²), α·shift²/(2σ²) (Mironov 2017, arXiv 1702.07476, proposition 7).

    orders: float64 [n]; sigma with σ² > 0. Both directions are the same.
    """
    with np.errstate(over="ignore"):
        return orders * (shift * shift) / (2.0 * sigma * sigma)


@functools.lru_cache(maxsize=8)
def _binomials(alphas: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Flattened over (α, k), k = 2…α: k − 2, α − k and log C(α, k); and where each α begins."""
    sizes = np.array([a - 1 for a in alphas])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    k = np.concatenate([np.arange(2, a + 1) for a in alphas])
    rest = np.repeat(alphas, sizes) - k
    log_factorial = gammaln(np.arange(max(alphas) + 1) + 1.0)
    log_binomial = log_factorial[k + rest] - log_factorial[k] - log_factorial[rest]
    return k - 2, rest.astype(np.float64), log_binomial, starts


def _log_a_integer(q: float, sigma: float, alphas: np.ndarray) -> np.ndarray:
    k_index, rest, log_binomial, starts = _binomials(tuple(int(a) for a in alphas))
    k = np.arange(2.0, alphas.max() + 1.0)
    # log of q^k (exp(k(k−1)/(2σ²)) − 1), per k only. x + log(1 − e^−x) = log(e^x − 1) without overflow.
    with np.errstate(divide="ignore", over="ignore"):
        x = k * (k - 1.0) / (2.0 * sigma * sigma)
        per_k = k * math.log(q) + x + np.log(-np.expm1(-x))
    terms = rest * math.log1p(-q)
    terms += log_binomial
    terms += per_k[k_index]
    top = np.maximum.reduceat(terms, starts)
    shift = np.where(np.isfinite(top), top, 0.0)
    terms -= np.repeat(shift, np.diff(np.append(starts, len(terms))))
    with np.errstate(divide="ignore", over="ignore"):
        return _log1p_exp(shift + np.log(np.add.reduceat(np.exp(terms, out=terms), starts)))


def _log1p_exp(log_excess: np.ndarray) -> np.ndarray:
    """log A from log(A − 1)."""
    return np.logaddexp(0.0, log_excess)


def _log_a_fractional(q: float, sigma: float, alphas: np.ndarray) -> np.ndarray:
    strip = min(math.pi * sigma, math.sqrt(2.0 * _EXPONENT))
    spacing = 2.0 * math.pi * strip / (_EXPONENT + 0.5 * strip * strip)
    with np.errstate(over="ignore"):
        affordable = (alphas / sigma + 2.0 * _REACH) / spacing <= _MAX_NODES
    log_a = np.empty_like(alphas)
    if not affordable.all():
        log_a[~affordable] = _log_a_chord(q, sigma, alphas[~affordable])
    inside = np.flatnonzero(affordable)
    for start in range(0, len(inside), _CHUNK):
        chunk = inside[start : start + _CHUNK]
        log_a[chunk] = _log_a_quadrature(q, sigma, alphas[chunk], spacing)
    return log_a


def _log_a_chord(q: float, sigma: float, alphas: np.ndarray) -> np.ndarray:
    """Upper bound: log A is convex in α and zero at α = 1."""
    below = np.floor(alphas)
    integers = np.unique(np.concatenate([below, below + 1.0]))
    known = np.zeros_like(integers)
    known[integers > 1.0] = _log_a_integer(q, sigma, integers[integers > 1.0])
    left, right = known[np.searchsorted(integers, below)], known[np.searchsorted(integers, below + 1.0)]
    weight = alphas - below
    return (1.0 - weight) * left + weight * right


def _log_a_quadrature(q: float, sigma: float, alphas: np.ndarray, spacing: float) -> np.ndarray:
    end = alphas.max() / sigma + _REACH
    x = -_REACH + spacing * np.arange(math.ceil((end + _REACH) / spacing) + 1)
    z = x / sigma - 0.5 / (sigma * sigma)
    # ℓ = log L. log1p(q·expm1(z)) keeps full relative precision near 0; for large z it would overflow.
    with np.errstate(over="ignore"):
        log_l = np.where(
            z < 1.0, np.log1p(q * np.expm1(np.minimum(z, 1.0))), np.logaddexp(math.log1p(-q), math.log(q) + z)
        )
    log_density = -0.5 * x * x - _LOG_SQRT_2PI
    log_excess = excess_sums(alphas, log_l, log_density) + math.log(spacing)
    # Right of the last node the integrand is below φ·L^α, which falls at least as fast as exp(−t·_REACH).
    right_tail = alphas * log_l[-1] + log_density[-1] - math.log(_REACH)
    scale = np.logaddexp(_log1p_exp(log_excess), np.log(1.0 + 2.0 * alphas))
    slack = np.logaddexp(right_tail, _LOG_QUADRATURE_SLACK + scale)
    return _log1p_exp(np.logaddexp(log_excess, slack))


def excess_sums(alphas: np.ndarray, ell: np.ndarray, log_density: np.ndarray) -> np.ndarray:
    """log Σ_x exp(log_density_x)·(L_x^α − 1 − α(L_x − 1)), L = e^ℓ, for alphas [n] over nodes ell, log_density [m]."""
    terms = _log_excess(alphas[:, None], ell[None, :]) + log_density
    top = terms.max(axis=1)
    shift = np.where(np.isfinite(top), top, 0.0)  # all −inf where q/σ underflows
    with np.errstate(divide="ignore"):
        return shift + np.log(np.exp(terms - shift[:, None]).sum(axis=1))


def _log_excess(alpha: np.ndarray, ell: np.ndarray) -> np.ndarray:
    """log(e^{αℓ} − 1 − α(e^ℓ − 1)) for α [n, 1] and ℓ [1, m], each branch free of cancellation."""
    beta = alpha - 1.0
    out = np.empty(np.broadcast_shapes(alpha.shape, ell.shape))
    flat = ell[0]
    # The series needs αℓ small; the other branches lose 1/(αℓ) units in the last place.
    near, positive = np.abs(flat) < min(1e-3, 0.012 / float(alpha.max())), flat > 0.0
    small, large, negative = near, positive & ~near, ~positive & ~near
    # Σ_{k≥2} (α^k − α) ℓ^k/k!, with α^k − α = α(α−1)(1 + α + … + α^{k−2}); ratio of terms below αℓ.
    power_sum, term, series = np.ones_like(alpha), 0.5, 0.5 * np.ones((len(alpha), int(small.sum())))
    for k in range(3, 9):
        power_sum = power_sum * alpha + 1.0
        term = term * flat[small] / k
        series += power_sum * term
    with np.errstate(divide="ignore"):  # ℓ may be exactly 0: log 0
        out[:, small] = np.log(alpha * beta * series) + 2.0 * np.log(np.abs(flat[small]))
    e = flat[large]
    decay = np.exp(-beta * e)
    bracket = -np.expm1(-beta * e) + beta * decay * np.expm1(-e)
    out[:, large] = alpha * e + np.log(bracket)
    e = flat[negative]
    out[:, negative] = np.log(np.exp(e) * np.expm1(beta * e) - beta * np.expm1(e))
    return out


def rdp_to_epsilon(rdp: np.ndarray, delta: float, orders: np.ndarray | None = None) -> float:
    """Smallest ε ≥ 0 for which the RDP curve implies (ε, δ)-differential privacy.

    ``ε = min_α ρ_α + log((α−1)/α) − (log δ + log α)/(α − 1)`` (Canonne, Kamath, Steinke 2020, arXiv
    2004.00010, proposition 12; Balle et al. 2020, arXiv 1905.09982, theorem 21), and ε = 0 when Pinsker's
    inequality bounds the total variation by δ: ρ/2 ≤ δ², the divergence being at most the RDP of any order.

    Args:
        rdp: float array [n], composed RDP at ``orders``; inf where there is none.
        delta: in (0, 1).
        orders: float array [n], ascending; default ``DEFAULT_ORDERS``.

    Returns:
        ε, inf when every order's RDP is inf.

    Raises:
        ValueError, TypeError: delta or an order out of range, an RDP that is negative or nan, or arrays of other shapes.
    """
    delta = checks.delta_value("delta", delta)
    rdp = checks.array("rdp", rdp, "an array of numbers ≥ 0")
    if orders is not None:
        orders = _checked_orders(orders)
    count = len(DEFAULT_ORDERS if orders is None else orders)
    if rdp.shape != (count,) or count == 0:
        raise ValueError(
            f"rdp must be [{count}], one number for each order and at least one, got {rdp.shape}"
        )
    if not bool((rdp >= 0.0).all()):
        raise ValueError(f"rdp must be ≥ 0, got {float(rdp[~(rdp >= 0.0)][0])!r}")
    return least_epsilon(rdp, delta, orders)


def least_epsilon(rdp: np.ndarray, delta: float, orders: np.ndarray | None = None) -> float:
    """``rdp_to_epsilon`` of arguments that are known to be right."""
    if 0.5 * float(rdp[0]) <= delta * delta:
        return 0.0
    offsets = _offsets(delta) if orders is None else conversion_offsets(orders, delta)
    return max(0.0, float((rdp + offsets).min()))


def log_delta_curve(rdp: np.ndarray, epsilon: float) -> float:
    """Upper bound on log δ at ε ≥ 0 that the RDP at ``DEFAULT_ORDERS`` implies; may be above 0.

    ``log δ = min_α (α−1)·(ρ_α − ε + log(1 − 1/α)) − log α``, the conversion of ``rdp_to_epsilon`` solved for δ, and
    Pinsker's inequality: δ is at most the total variation, sqrt(ρ/2).
    """
    with np.errstate(divide="ignore"):
        pinsker = 0.5 * float(np.log(0.5 * rdp[0]))
    exponents = (DEFAULT_ORDERS - 1.0) * (rdp - epsilon + np.log1p(-1.0 / DEFAULT_ORDERS))
    # Rounding: the products reach 1e5, their error 1e-10.
    return min(pinsker, float((exponents - np.log(DEFAULT_ORDERS)).min()) + 1e-9)


@functools.lru_cache(maxsize=64)
def _offsets(delta: float) -> np.ndarray:
    return conversion_offsets(DEFAULT_ORDERS, delta)


def conversion_offsets(orders: np.ndarray, delta: float) -> np.ndarray:
    """What is added to the RDP at each order to get ε at δ (``rdp_to_epsilon``)."""
    return np.log1p(-1.0 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1.0)
