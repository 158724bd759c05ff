"""ε after every step of a run whose noise or sampling rate changes: what has been composed is kept.

The answer is a function of the ledger alone, however often and in whatever order it was asked for: of all entries but
the last, whose count may still grow, the first 16, 32, 64, … decide the course, whichever is the last of these numbers
that there are, and the entries are composed along it one by one, in their order. A restored accountant repeats exactly
that, and reports the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from adaclip.accounting.chernoff import Chernoff, Moments
from adaclip.accounting.course import find_course
from adaclip.accounting.mixtures import Mixtures
from adaclip.accounting.releases import Event, SubsampledGaussian
from adaclip.accounting.search import Search
from adaclip.accounting.smooth import Factors, Smooth, factors
from adaclip.accounting.terms import collect

_FIRST = 16  # entries; fewer are composed from nothing as fast
_GROWTH = 2.0  # of the number of entries until the next plan
_REL = 1e-3
_ONE = np.ones(1)


class Running:
    """Bounds on ε at one δ, removing or adding an example, for a ledger that grows.

    Args:
        delta: in (0, 1).
    """

    def __init__(self, delta: float) -> None:
        self._delta = delta
        self._planned: list[Event] = []  # what the course was planned on
        self._done: list[Event] = []  # composed
        self._smooth: Smooth | None = None
        self._chernoff: Chernoff | None = None
        self._earlier: tuple[Smooth, Chernoff] | None = None  # before the last entry of these
        self._start = 0.0
        self._last: tuple[SubsampledGaussian, Factors, Moments] | None = None

    def bounds(self, events: Sequence[Event]) -> tuple[float, float] | None:
        """(lower, upper) at most 1e-3 apart; None where the events or the numbers are not of the kind for it."""
        closed = list(events[:-1])  # the last one's count may still grow
        if len(closed) < _FIRST:
            return None
        planned = closed[: 1 << (len(closed).bit_length() - 1)]
        if self._earlier is not None and self._done[:-1] == closed:
            # One entry was asked about, and not booked.
            self._smooth, self._chernoff = self._earlier
            self._earlier, self._done = None, closed
        if self._planned != planned or self._done != closed[: len(self._done)]:
            self._plan(planned)
            self._planned, self._done, self._earlier = planned, [], None
        if self._smooth is None:
            return None
        for event in closed[len(self._done) :]:
            if not _is_mixture(event.release):
                return None
            self._earlier = self._smooth.copy(), self._chernoff.copy()
            self._compose(self._smooth, self._chernoff, event)
            self._done.append(event)
        return self._solve(events[-1])

    def _plan(self, events: Sequence[Event]) -> None:
        self._smooth = self._chernoff = self._last = None
        if not all(_is_mixture(release) for release, _ in events):
            return
        terms = collect(events, "add_remove", self._delta)
        terms = terms._replace(counts=_GROWTH * terms.counts)
        search = Search(terms, False, self._delta)
        if search.epsilon <= 0.0:
            return
        course = find_course(
            search.draft, False, search.epsilon, math.log(self._delta), _REL * search.epsilon, 1.0 / _GROWTH
        )
        if course is not None:
            self._smooth = Smooth(course)
            guess = Chernoff.near(terms.mixtures, terms.counts, search.bend, 1e-3 * self._delta)
            self._chernoff = Chernoff(np.array([guess.best(search.epsilon)]))
            self._start = search.epsilon / math.sqrt(_GROWTH)

    def _solve(self, event: Event) -> tuple[float, float] | None:
        """With one more entry, whose count may still grow."""
        if not _is_mixture(event.release):
            return None
        smooth, chernoff = self._smooth.copy(), self._chernoff.copy()
        self._compose(smooth, chernoff, event)
        lower, upper = smooth.epsilon_bounds(
            self._delta, self._start * math.sqrt((len(self._done) + 1) / len(self._planned))
        )
        close = lower > 0.0 and upper - lower <= _REL * upper
        return (lower, upper) if close and chernoff.delta(lower) <= self._delta else None

    def _compose(self, smooth: Smooth, chernoff: Chernoff, event: Event) -> None:
        # One entry at a time, always: arrays of other shapes might round otherwise.
        if self._last is None or self._last[0] != event.release:
            law = Mixtures(event.release.q * _ONE, _ONE / event.release.sigma, np.zeros((1, 1)))
            placed = smooth.course.place(law)
            self._last = event.release, factors(placed, smooth.course), chernoff.moments(placed)
        smooth.add(self._last[1], event.count * _ONE)
        chernoff.add(self._last[2], event.count * _ONE)


def _is_mixture(release: object) -> bool:
    return (
        isinstance(release, SubsampledGaussian)
        and release.sampling == "poisson"
        and 0.0 < release.q < 1.0
        and 0.01 <= release.sigma < math.inf
    )
