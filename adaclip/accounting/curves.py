"""What an attacker can do at best: trade-off curve, advantage and Bayes risk from an accountant's δ(ε).

An attacker sees everything that was released, knows every other example, and must tell whether a given
example was used (under ``replace_one``: which of two values it had). A rule for this has a false positive
rate α ("used" although it was not) and a false negative rate β. The accountant certifies that the releases
are (ε, δ(ε))-private for every ε ≥ 0, in both directions, so for every rule

    β ≥ 1 − δ(ε) − e^ε α    and    β ≥ e^−ε (1 − δ(ε) − α)

(Wasserman and Zhou 2010, arXiv 0811.2501). By the duality of Dong, Roth, Su 2019 (arXiv 1905.02383) the
largest of these bounds over all ε is everything that δ(ε) says of such tests.

Everything here is certified in the same sense as the accountant's upper bounds on δ, which is all it uses:
no attacker does better than these figures, whatever its computing power. Real attackers, who know less,
do worse. The statements are about one example (or ``group_size`` examples at once) chosen without looking
at the releases; they say nothing of what the population's statistics reveal about a person who took no part.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from adaclip.accounting import checks
from adaclip.accounting.accountant import Accountant

_FIRST = 2.0**-6
_LAST = 700.0  # e^700 is near the end of floats, and no β beyond it matters
_MAX_PAIRS = 4096
_ROUNDING = 1e-15  # absolute, of sums of numbers ≤ 1 in what is subtracted below


def trade_off_curve(
    source: Accountant | Callable[[float], float],
    alpha: ArrayLike,
    *,
    group_size: int = 1,
    tolerance: float = 1e-3,
) -> np.ndarray:
    """Certified lower bound on the false negative rate β of every attacker with false positive rate ≤ α.

    The maximum of finitely many of the module's lines, so it is a lower bound for whichever ε are tried; it
    is convex, never increases with α, and lies between 0 and 1 − α. The ε are chosen until more of them
    could raise it by no more than ``tolerance``, as δ(ε) is convex in e^ε. For a Gaussian release of
    parameter μ it is ``Φ(Φ⁻¹(1 − α) − μ)`` up to that.

    Args:
        source: an accountant, or a function from ε ≥ 0 to a certified upper bound on δ, which must hold
            for both directions.
        alpha: float array [...] of false positive rates in [0, 1].
        group_size: how many examples are told from their absence together, ≥ 1.
        tolerance: absolute, in (0, 1). 1e-3 takes some tens of evaluations of δ.

    Returns:
        float64 array [...].

    Raises:
        ValueError, TypeError: an argument out of range.
    """
    alpha = checks.array("alpha", alpha, "numbers in [0, 1]")
    if not ((alpha >= 0.0) & (alpha <= 1.0)).all():
        bad = alpha[~((alpha >= 0.0) & (alpha <= 1.0))].flat[0]
        raise ValueError(f"alpha must be in [0, 1], got {float(bad)!r}")
    tolerance = checks.delta_value("tolerance", tolerance)
    epsilons, deltas = _certified_pairs(_profile(source, group_size), tolerance)
    best = np.zeros_like(alpha)
    for epsilon, delta in zip(epsilons, deltas, strict=True):
        kept, slope = _kept(delta), math.exp(epsilon)
        np.maximum(best, kept - slope * alpha * (1.0 + _ROUNDING), out=best)
        np.maximum(best, (kept - alpha) / (slope * (1.0 + _ROUNDING)), out=best)
    return best


def advantage(source: Accountant | Callable[[float], float], *, group_size: int = 1) -> float:
    """Certified upper bound on any attacker's advantage: its true minus its false positive rate.

    That is δ(0), a bound on the total variation distance between the releases with and without the example.
    For a Gaussian release of parameter μ it is ``2Φ(μ/2) − 1``. (Kulynych et al. 2024, arXiv 2407.02191,
    argue for stating this figure.)

    Args:
        source, group_size: as ``trade_off_curve``.

    Returns:
        in [0, 1]; 0 without releases.

    Raises:
        ValueError, TypeError: an argument out of range.
    """
    return _profile(source, group_size)(0.0)


def bayes_risk(
    source: Accountant | Callable[[float], float], prior: float = 0.5, *, group_size: int = 1
) -> float:
    """Certified lower bound on the error probability of any attacker who holds the example used with
    probability ``prior`` beforehand.

    The least of ``(1 − π)α + πβ`` over all rules is at least ``min(π, 1 − π) · (1 − δ(|log(π/(1 − π))|))``,
    with equality for the exact δ of the direction that counts (Kaissis et al. 2024, arXiv 2406.08918). At π = 1/2 this is ``(1 − advantage)/2``. Without looking, the attacker errs with
    probability min(π, 1 − π).

    Args:
        source, group_size: as ``trade_off_curve``.
        prior: π, in [0, 1].

    Returns:
        in [0, 1/2].

    Raises:
        ValueError, TypeError: an argument out of range.
    """
    prior = checks.probability("prior", prior)
    rarer = min(prior, 1.0 - prior)
    profile = _profile(source, group_size)
    if rarer == 0.0:
        return 0.0
    # The bound holds for every ε up to the log odds: rounded down.
    odds = max(0.0, (math.log1p(-rarer) - math.log(rarer)) * (1.0 - 1e-14) - _ROUNDING)
    return rarer * _kept(profile(odds))


def _profile(source: Accountant | Callable[[float], float], group_size: int) -> Callable[[float], float]:
    """ε ↦ certified upper bound on δ for the group, in [0, 1]."""
    size = checks.integer("group_size", group_size, 1)
    if isinstance(source, Accountant):
        of_one = source.get_delta
    elif callable(source):
        of_one = source
    else:
        raise TypeError(f"source must be an accountant or a function from epsilon to delta, got {source!r}")

    def delta(epsilon: float) -> float:
        share = epsilon / size
        value = checks.real(f"source({share!r})", of_one(share), "a delta ≥ 0")
        if not value >= 0.0:
            raise ValueError(f"source must give a delta ≥ 0, got {value!r} at epsilon = {share!r}")
        if size > 1:
            # Triangle inequality over the chain of neighbors: δ · (1 + e^share + … + e^((size − 1) share)).
            factor = math.expm1(epsilon) / math.expm1(share) if share > 0.0 else float(size)
            value *= factor * (1.0 + 1e-14)
        return min(1.0, value)

    return delta


def _kept(delta: float) -> float:
    """1 − δ, rounded down."""
    return max(0.0, 1.0 - delta - _ROUNDING) if delta > 0.0 else 1.0


def _certified_pairs(delta: Callable[[float], float], tolerance: float) -> tuple[list[float], list[float]]:
    """ε, ascending, and δ(ε), such that no other ε could raise the curve by more than about ``tolerance``.

    With u = e^ε, β's first form is the conjugate of δ(u), and sup-norm errors of convex functions are those
    of their conjugates (the second form mirrors it in α). δ(u) between two nodes lies below the chord and
    above its neighbors' prolongations: their distance is what a further node could bring.
    """
    epsilons = [0.0, _FIRST]
    deltas = [delta(epsilon) for epsilon in epsilons]
    while deltas[-1] > tolerance and epsilons[-1] < _LAST:
        epsilons.append(min(2.0 * epsilons[-1], _LAST))
        deltas.append(delta(epsilons[-1]))
    while len(epsilons) < _MAX_PAIRS:
        u, d = np.exp(epsilons), np.asarray(deltas)
        width = np.diff(u)
        slopes = np.diff(d) / width
        # Slopes of δ(u) are probabilities, negated: −1 on the left and 0 on the right bound them.
        left = np.abs(slopes - np.append(-1.0, slopes[:-1]))
        right = np.abs(np.append(slopes[1:], 0.0) - slopes)
        with np.errstate(invalid="ignore"):
            gap = width * np.where(left + right > 0.0, left / (left + right) * right, 0.0)
        # Where an interval this short still looks coarse the bound jumps: halving it would not end.
        coarse = np.flatnonzero((gap > tolerance) & (np.diff(epsilons) > 1e-9 * np.asarray(epsilons[1:])))
        if not coarse.size:
            break
        for i in coarse[::-1]:
            middle = 0.5 * (epsilons[i] + epsilons[i + 1])
            epsilons.insert(i + 1, middle)
            deltas.insert(i + 1, delta(middle))
    return epsilons, deltas
