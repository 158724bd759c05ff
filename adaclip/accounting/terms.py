"""What a list of events comes to under one adjacency: Gaussian releases, mixtures, and laws that are atomic already.

| event | add_remove | zero_out | replace_one |
|---|---|---|---|
| Poisson, q < 1 | mixture, exact | the same | pair of mixtures, exact |
| fixed size, q < 1 | no guarantee | joint convexity | joint convexity |
| q = 1 (shuffled: one an epoch) | Gaussian, shift 1 | shift 1 | shift 2 |
| Laplace, pure, approximate | their own laws, whose parameters are stated for the ledger's adjacency | | |

Truncated Poisson sampling differs from Poisson sampling with probability at most ``overflow`` a step and on either
of two neighbors, which adds (1 + e^ε)·overflow to δ (Chua et al. 2024, arXiv 2411.04205).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import erf, gammaln

from adaclip.accounting.atoms import Atoms
from adaclip.accounting.gaussian import RELATIVE
from adaclip.accounting.laws import approximate_law, fixed_size_law, laplace_law, replacement_law
from adaclip.accounting.mixtures import Mixtures
from adaclip.accounting.releases import ApproximateDP, Event, Laplace, PureDP, SubsampledGaussian


class Terms(NamedTuple):
    """A composition, sorted by how its parts are composed.

    Attributes:
        mixtures, counts: [E] Poisson-subsampled Gaussian events; None and [0] if there are none.
        fixed: (upper, lower, count) of laws that are atomic; lower is None where nothing is known from below.
        gauss: μ² of all Gaussian releases together.
        overflow: Σ count·overflow.
        noiseless: probability that a release without noise shows the example.
        single: (q, μ) if the composition is one Poisson-subsampled Gaussian release and nothing else.
        directions: (False,) if adding and removing are the same, else (False, True).
    """

    mixtures: Mixtures | None
    counts: np.ndarray
    fixed: list[tuple[Atoms, Atoms | None, float]]
    gauss: float
    overflow: float
    noiseless: float
    single: tuple[float, float] | None
    directions: tuple[bool, ...]

    def total_variation(self) -> float:
        """An upper bound on δ(0): total variations add up at most."""
        bound = self.overflow * 2.0 + float(erf(math.sqrt(self.gauss / 8.0)))
        if self.mixtures is not None:
            shift = self.mixtures.mu * self.mixtures.log_weights.shape[1]
            bound += float(self.counts @ (self.mixtures.q * erf(shift / math.sqrt(8.0))))
        for upper, _, count in self.fixed:
            gain = np.exp(upper.log_mass) * np.maximum(np.expm1(upper.loss), 0.0)
            bound += count * float(gain.sum() + upper.infinite.sum())
        return bound * (1.0 + RELATIVE)

    def largest_loss(self, delta: float) -> float:
        """An upper bound on ε at δ: the largest loss there can be, but for infinite ones of probability δ."""
        beyond = sum(count * float(upper.infinite.sum()) for upper, _, count in self.fixed)
        if (
            self.mixtures is not None
            or self.gauss > 0.0
            or self.overflow > 0.0
            or beyond * (1.0 + RELATIVE) > delta
        ):
            return math.inf
        return sum(count * float(upper.loss.max()) for upper, _, count in self.fixed) * (1.0 + RELATIVE)


def has_group_law(events: Sequence[Event], adjacency: str) -> bool:
    """Whether ``collect`` takes a group of more than one: Poisson-sampled events only."""
    return adjacency == "add_remove" and all(
        isinstance(release, SubsampledGaussian) and release.sampling == "poisson" for release, _ in events
    )


def collect(events: Sequence[Event], adjacency: str, delta: float, group_size: int = 1) -> Terms:
    """Sort events that are checked and have a guarantee under ``adjacency``; equal ones are counted together.

    ``delta`` decides which losses are too rare to matter, where a law is not cut later.
    """
    totals: dict[object, int] = {}
    for release, count in events:
        if count:
            totals[release] = totals.get(release, 0) + count
    mixed: dict[tuple[float, float], int] = {}
    fixed: list[tuple[Atoms, Atoms | None, float]] = []
    gauss = overflow = 0.0
    log_unseen = 0.0
    for release, count in totals.items():
        if isinstance(release, SubsampledGaussian):
            overflow += count * release.overflow
            q, sigma = release.q, release.sigma
            if q == 0.0 or math.isinf(sigma):
                continue
            shift = 2.0 if adjacency == "replace_one" else float(group_size)
            if sigma * sigma < 1e-300:
                log_unseen += -math.inf if q == 1.0 else count * group_size * math.log1p(-q)
            elif q == 1.0:
                gauss += count * (shift / sigma) ** 2
            elif release.sampling == "fixed_size":
                fixed.append((*fixed_size_law(q, 1.0 / sigma, shift, _lost(delta, count)), float(count)))
            elif adjacency == "replace_one":
                fixed.append((*replacement_law(q, 1.0 / sigma, _lost(delta, count)), float(count)))
            else:
                mixed[q, 1.0 / sigma] = mixed.get((q, 1.0 / sigma), 0) + count
        elif isinstance(release, Laplace):
            fixed.append((*laplace_law(release.scale), float(count)))
        elif isinstance(release, PureDP):
            fixed.append((approximate_law(release.epsilon, 0.0), None, float(count)))
        elif isinstance(release, ApproximateDP):
            fixed.append((approximate_law(release.epsilon, release.delta), None, float(count)))
    counts = np.array(list(mixed.values()), dtype=np.float64)
    single = None
    if group_size == 1 and len(mixed) == 1 and counts[0] == 1 and not (fixed or gauss or overflow):
        single = next(iter(mixed))
    # Laplace and (ε, δ) laws are symmetric, and so are the upper laws under the other adjacencies; the data sets
    # behind their lower laws are not.
    symmetric = not mixed and adjacency == "add_remove"
    return Terms(
        mixtures=_mixtures(mixed, group_size),
        counts=counts,
        fixed=fixed,
        gauss=gauss,
        overflow=overflow,
        noiseless=-math.expm1(log_unseen),
        single=single,
        directions=(False,) if symmetric else (False, True),
    )


def _lost(delta: float, count: float) -> float:
    """Probability that may be lost a step; a power of ten, so that laws are found again."""
    return 10.0 ** math.floor(math.log10(1e-6 * delta / count))


def _mixtures(mixed: dict[tuple[float, float], int], group_size: int) -> Mixtures | None:
    if not mixed:
        return None
    q, mu = (np.array(column) for column in zip(*mixed, strict=True))
    if group_size == 1:
        return Mixtures(q, mu, np.zeros((len(q), 1)))
    # Of a group of k, Binomial(k, q) take part; conditioned on at least one.
    j = np.arange(1.0, group_size + 1.0)
    log_choose = gammaln(group_size + 1.0) - gammaln(j + 1.0) - gammaln(group_size - j + 1.0)
    log_any = np.log(-np.expm1(group_size * np.log1p(-q)))
    log_weights = (
        log_choose + j * np.log(q)[:, None] + (group_size - j) * np.log1p(-q)[:, None] - log_any[:, None]
    )
    return Mixtures(np.exp(log_any), mu, log_weights)
