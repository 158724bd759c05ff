"""The Gaussian-DP figure of composed steps: **an approximation for display, never a guarantee**.

By the central limit theorem for trade-off functions, many small steps together look like one Gaussian
release of parameter μ (noise of standard deviation 1, shifted by μ), with

    μ² = Σ_t q_t² (exp(1/σ_t²) − 1)

for Poisson-subsampled Gaussian steps (Bu, Dong, Long, Su 2020, arXiv 1911.11607; Dong, Roth, Su 2019, arXiv
1905.02383, for the theorem). The limit says nothing of the error at a finite number of steps.
In practice the figure is below the true ε, by a few percent for ordinary training and by a third for
tiny q, so it must not be reported as the privacy of anything. ``PLDAccountant`` and ``RDPAccountant`` give
bounds.

Where every step has q = 1 the composition is a Gaussian release, and the figure is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from adaclip.accounting import checks
from adaclip.accounting.gaussian import gaussian_epsilon
from adaclip.accounting.releases import (
    ADJACENCIES,
    Event,
    Release,
    SubsampledGaussian,
    checked_event,
    event_pairs,
    is_noiseless,
    is_silent,
)

_SAMPLINGS = ("poisson", "truncated_poisson", "shuffled")
_LARGEST_MU = 1e150  # beyond it ε ≈ μ²/2 leaves the range of floats


def gdp_epsilon(
    events: Iterable[Event], delta: float, *, adjacency: str = "add_remove", group_size: int = 1
) -> float:
    """ε at ``delta`` by the central limit theorem: an approximation, usually below the true ε.

    Args:
        events: ``(release, count)`` pairs, as ``Ledger.events``. Subsampled Gaussian steps by Poisson
            sampling (a cap on the batch, ``truncated_poisson``, is ignored) or with q = 1.
        delta: in (0, 1).
        adjacency: one of ``ADJACENCIES``.
        group_size: k ≥ 1 examples together count kμ (Dong, Roth, Su 2019, on groups).

    Returns:
        ε ≥ 0; 0 without steps, inf if a step with q > 0 had no noise.

    Raises:
        ValueError, TypeError: an argument out of range, or a release the theorem has no formula for here
            (fixed-size batches, Laplace, pure and approximate releases).
    """
    delta = checks.delta_value("delta", delta)
    size = checks.integer("group_size", group_size, 1)
    mu = size * gdp_mu(events, adjacency=adjacency)
    return gaussian_epsilon(mu, delta) if mu < _LARGEST_MU else math.inf


def gdp_mu(events: Iterable[Event], *, adjacency: str = "add_remove") -> float:
    """The parameter μ of the Gaussian release that the steps approach: an approximation, as ``gdp_epsilon``.

    Under ``replace_one`` a Poisson-sampled example pulls one way or the opposite way, and the likelihood
    ratio's variance per step is 2q² (exp(1/σ²) − exp(−1/σ²)). A step with q = 1 counts exactly: 1/σ², or 4/σ²
    under ``replace_one``.

    Args, Raises: as ``gdp_epsilon``.

    Returns:
        μ ≥ 0; inf if a step with q > 0 had no noise, or where μ exceeds the range of floats.
    """
    checks.one_of("adjacency", adjacency, ADJACENCIES)
    # Under zero_out every kind of sampling has a guarantee, and may be asked about.
    checked = [checked_event(release, count, "zero_out") for release, count in event_pairs("events", events)]
    logs = [_log_square(release, adjacency) + math.log(count) for release, count in checked if count]
    top = max(logs, default=-math.inf)
    if math.isinf(top):
        return 0.0 if top < 0.0 else math.inf
    log_mu = 0.5 * (top + math.log(math.fsum(math.exp(value - top) for value in logs)))
    return math.exp(log_mu) if log_mu < 709.0 else math.inf


def _log_square(release: Release, adjacency: str) -> float:
    """log of one step's share of μ²."""
    if is_silent(release):
        return -math.inf
    if not isinstance(release, SubsampledGaussian) or release.sampling not in _SAMPLINGS:
        raise ValueError(
            "the central limit figure covers Gaussian steps with sampling "
            f"{', '.join(repr(name) for name in _SAMPLINGS)}, got {release!r}"
        )
    if is_noiseless(release):
        return math.inf
    q, sigma = release.q, release.sigma
    replace = adjacency == "replace_one"
    if q == 1.0:
        return 2.0 * math.log(2.0 if replace else 1.0) - 2.0 * math.log(sigma)
    x = (1.0 / sigma) * (1.0 / sigma)
    if x == 0.0:
        return -math.inf
    # In logs: exp(1/σ²) overflows from σ = 0.037 down.
    doubled = 2.0 * x if replace else x
    return 2.0 * math.log(q) + x + math.log(-math.expm1(-doubled)) + (math.log(2.0) if replace else 0.0)
