"""Certified two-sided ε of composed releases, by their privacy loss distributions.

    epsilon_bounds([Event(SubsampledGaussian(256 / 60_000, 1.1), 14_000)], delta=1e-5)    # (2.37584, 2.37587)

Where the moment functions of the steps fall fast enough, as they do when many are composed, they are integrated
exactly (``smooth``), and the bounds lie as close together as rounding lets them. Elsewhere each event becomes two
atomic laws, one below it and one above (``atoms``); both are composed through their moment functions, and δ(ε) of the
composition is bounded with every numerical error explicit (``transform``, ``jumps``). What is left to chance is only
how close those two bounds are: a plan (``plan``) aims at a relative distance of ``rel``, and is made again, finer,
where it missed.

Both directions, removing and adding an example, are composed; the worse one counts. Neither is always the worse one
(Lebeda, Regehr, Kamath, Steinke 2024, arXiv 2405.20769).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from adaclip.accounting.chernoff import Chernoff
from adaclip.accounting.gaussian import (
    RELATIVE,
    gaussian_epsilon,
    gaussian_log_delta,
    subsampled_delta,
    subsampled_epsilon,
)
from adaclip.accounting.plan import Target
from adaclip.accounting.releases import Event
from adaclip.accounting.search import Search
from adaclip.accounting.solve import solve
from adaclip.accounting.terms import Terms, collect

_ROUNDS = 12
# log of transform / δ beyond which rounding is felt, and small and large losses are composed apart.
_STRAIN = 4.0
_HUGE = 100.0  # 1/σ: no accountant tells such ε apart, and losses of e^5000 overflow
_NEGLIGIBLE = 1e-20  # a δ below it is bounded, and not told more closely
_SMALL = 0.4  # share of ε up to which losses are small; of a few steps, so small that all stay below ε


def epsilon_bounds(
    events: Sequence[Event],
    delta: float,
    adjacency: str = "add_remove",
    group_size: int = 1,
    rel: float = 1e-3,
) -> tuple[float, float]:
    """(lower, upper) around the ε at which the composed events are (ε, δ)-private.

    Args:
        events: releases and counts; every release must have a guarantee under ``adjacency``.
        delta: in (0, 1).
        adjacency: one of ``releases.ADJACENCIES``.
        group_size: how many examples differ; more than one only for Poisson-sampled events under add_remove and
            zero_out (Ganesh 2024, arXiv 2401.10294).
        rel: wanted (upper − lower)/upper.

    Returns:
        Bounds that hold whatever ``rel``; upper is inf for events without noise.
    """
    terms = collect(events, adjacency, delta, group_size)
    if terms.noiseless > 0.0:
        return (math.inf if terms.noiseless > delta else 0.0), math.inf
    exact = _closed_form(terms, delta)
    if exact is not None:
        return _widened(exact, terms)
    if terms.total_variation() <= delta:
        return 0.0, 0.0
    if terms.mixtures is not None and float(terms.mixtures.mu.max()) > _HUGE:
        return 0.0, math.inf
    lower = upper = saddle = 0.0
    for swapped in terms.directions:
        if swapped and lower > 0.0 and _beaten(terms, delta, lower, saddle):
            break
        search = Search(terms, swapped, delta)
        saddle = search.bend
        low, high = _direction(search, terms, delta, rel, lower)
        lower, upper = max(lower, low), max(upper, high)
    return lower, max(lower, min(upper, terms.largest_loss(delta)))


def _widened(exact: float, terms: Terms) -> tuple[float, float]:
    """Bounds around a closed form: its two tails cancel as the shift μ becomes small."""
    shift = terms.single[1] if terms.single is not None else math.sqrt(terms.gauss)
    rounding = min(RELATIVE + 1e-14 / shift, 1.0) if shift > 0.0 else 0.0
    return exact * (1.0 - rounding), exact * (1.0 + rounding)


def _closed_form(terms: Terms, delta: float) -> float | None:
    if terms.mixtures is None and not terms.fixed and terms.overflow == 0.0:
        return gaussian_epsilon(math.sqrt(terms.gauss), delta)
    if terms.single is not None:
        return subsampled_epsilon(*terms.single, delta)
    return None


def _direction(search: Search, terms: Terms, delta: float, rel: float, known: float) -> tuple[float, float]:
    """Bounds for one direction; the lower one may be 0 where the upper one is below ``known`` already."""
    if not math.isfinite(search.epsilon + search.spread + search.bend):
        # No saddle point in floats: nearly no noise at a tiny rate, and δ within rounding of the total variation.
        return 0.0, math.inf
    smooth = search.smooth(search.epsilon, rel * search.epsilon) if search.epsilon > 0.0 else None
    if smooth is not None:
        low, high = smooth.epsilon_bounds(delta, search.epsilon)
        if high - low <= rel * high:
            return low, high
    best, last = (0.0, math.inf), math.inf
    epsilon = max(search.epsilon, 1e-3 * search.spread)
    share = 0.4 * rel
    target = Target(share * epsilon, share * epsilon, search.bend)
    if search.epsilon <= 0.0:
        # δ may exceed the total variation; then nothing else needs to be known.
        coarse = Target(0.01 * search.spread, 0.01 * search.spread, search.bend)
        if search.compose(0.0, coarse)[1].delta(0.0)[0] <= delta:
            return 0.0, 0.0
    # Many different events are planned for on a few that represent them, then composed one by one.
    rough = search.representatives is not None
    for attempt in range(_ROUNDS):
        below, above = search.compose(epsilon, target, rough=rough)
        high = solve(above, delta, epsilon)
        if attempt < 5 and high < math.inf:
            # Where the saddle point's ε was off, or rounding is felt, the plan is for another place or another way.
            moved = abs(high - epsilon) > 0.05 * epsilon
            # Twice the transforms: many different events wait until they must.
            limit = _STRAIN if search.representatives is None else 2.0 * _STRAIN
            small = high * (_SMALL if terms.counts.sum() > 8.0 else 0.5 / max(terms.counts.sum(), 1.0))
            split = above.strain(high, delta) > limit and search.should_split(small)
            if split:
                search.split(small)
            if moved or split:
                epsilon = max(high, 1e-3 * search.spread)
                target = Target(share * epsilon, share * epsilon, above.bend(high))
                continue
        low = solve(below, delta, epsilon)
        if rough and high - low <= rel * high:
            rough, last = False, math.inf
            below, above = search.compose(epsilon, target)
            low, high = solve(below, delta, epsilon), solve(above, delta, epsilon)
        gap = high - low
        if not rough:
            best = max(best[0], low), min(best[1], high)
            if best[1] < math.inf and (best[1] - best[0] <= rel * best[1] or best[1] < known):
                break
        if attempt > 4 and not gap < 0.9 * last:
            if not rough:
                break
            rough = False
        last = gap
        if math.isfinite(high):
            epsilon = max(0.5 * (low + high), 1e-4 * search.spread)
            bend = below.bend(epsilon)
            damping = below.damping * bend
            cells = target.cells * min(0.7, max(0.01, share * epsilon / max(gap - damping, 0.1 * gap)))
            target = Target(share * epsilon, cells, bend)
        else:
            epsilon *= 1.5
    return best


def delta_bounds(
    events: Sequence[Event], epsilon: float, adjacency: str = "add_remove", rel: float = 1e-3
) -> tuple[float, float]:
    """(lower, upper) around δ(ε) of the composed events.

    Args:
        events: releases and counts; every release must have a guarantee under ``adjacency``.
        epsilon: ≥ 0 and finite.
        adjacency: one of ``releases.ADJACENCIES``.
        rel: wanted (upper − lower)/upper.

    Returns:
        Bounds that hold whatever ``rel``, in [0, 1]; an upper one below 1e-20 may be far above the lower one.
    """
    terms = collect(events, adjacency, 1e-12)
    if terms.noiseless > 0.0:
        return terms.noiseless, 1.0
    if terms.mixtures is None and not terms.fixed and terms.overflow == 0.0:
        exact = math.exp(float(gaussian_log_delta(epsilon, math.sqrt(terms.gauss)))) if terms.gauss else 0.0
        return _widened(exact, terms)
    if terms.single is not None:
        return _widened(subsampled_delta(*terms.single, epsilon), terms)
    variation = terms.total_variation()
    if variation <= _NEGLIGIBLE:
        return 0.0, variation
    lower = upper = 0.0
    for swapped in terms.directions:
        low, high = _delta_of_direction(terms, epsilon, swapped, rel)
        lower, upper = max(lower, low), max(upper, high)
    return lower, min(upper, 1.0, variation)


def _delta_of_direction(terms: Terms, epsilon: float, swapped: bool, rel: float) -> tuple[float, float]:
    delta = 1e-5
    for _ in range(3):  # the law is cut off where it does not matter at δ, and δ is what is sought
        search = Search(terms, swapped, delta)
        delta = min(max(search.delta_at(epsilon), _NEGLIGIBLE), 0.5)
    search = Search(terms, swapped, delta)
    bend = 1.0 + 1.0 / max(search.spread, 1e-9)
    smooth = search.smooth(epsilon, rel / bend)
    if smooth is not None:
        low, high = smooth.delta(epsilon, upper=False)[0], smooth.delta(epsilon, upper=True)[0]
        if high - low <= rel * high:
            return low, high
    target = Target(0.2 * rel / bend, 0.2 * rel / bend, bend)
    best = (0.0, 1.0)
    for _ in range(_ROUNDS):
        below, above = search.compose(epsilon, target)
        low, high = below.delta(epsilon)[0], above.delta(epsilon)[0]
        best = max(best[0], low), min(best[1], high)
        if best[1] - best[0] <= rel * best[1] or best[1] < _NEGLIGIBLE:
            break
        if (
            above.strain(epsilon, best[1]) > _STRAIN
            and search.should_split(_SMALL * epsilon)
            and epsilon > 0.0
        ):
            search.split(_SMALL * epsilon)
        gap = (high - low) / max(high, 1e-300)
        finer = min(0.5, max(0.02, 0.5 * rel / gap))
        target = Target(target.damping * finer, target.cells * finer, target.bend)
    return best


def _beaten(terms: Terms, delta: float, epsilon: float, saddle: float) -> bool:
    """Whether Chernoff's inequality alone shows that adding an example costs less than ``epsilon``."""
    if terms.mixtures is None or terms.fixed:
        return False
    chernoff = Chernoff.near(terms.mixtures, terms.counts, saddle, 1e-3 * delta)
    return chernoff.delta(epsilon, terms.gauss, terms.overflow) <= delta
