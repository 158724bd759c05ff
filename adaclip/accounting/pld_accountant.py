"""The accountant of certified two-sided bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from adaclip.accounting import pld
from adaclip.accounting.accountant import Accountant
from adaclip.accounting.rdp_accountant import RDPAccountant
from adaclip.accounting.releases import Event
from adaclip.accounting.running import Running
from adaclip.accounting.terms import has_group_law


class PLDAccountant(Accountant):
    """ε by privacy loss distributions: bounds on both sides, in milliseconds.

    The upper bound is what ``get_epsilon`` reports. Under add_remove, zero_out and replace_one, for Poisson-sampled
    Gaussian steps and for Gaussian and Laplace releases, the distance ``(upper − lower)/upper`` is at most 1e-3, and
    about 1e-5 for many steps (it may be more for ε below about 1 % of the standard deviation of the privacy loss, and
    for a few steps at sampling rates near 1e-6); for releases of which only a bound is known (pure and approximate DP,
    fixed-size batches, truncated ones) it may be more. See ``adaclip.accounting.pld`` for the method.

    A run that asks for ε after every step composes what is new only (``running``): about a millisecond for a step with
    noise of its own.

    The bounds are those of a schedule of releases that was fixed in advance. They are no privacy filter: stopping,
    or choosing later noise or sampling rates, by their running value on data-dependent grounds is not covered
    (arXiv 2602.06756); ``RDPAccountant`` is valid there.
    """

    name = "pld"

    def __init__(self, adjacency: str = "add_remove") -> None:
        super().__init__(adjacency)
        self._known: dict[tuple, tuple[float, float]] = {}
        self._running: dict[float, Running] = {}

    def _epsilon_bounds(self, events: Sequence[Event], delta: float, group_size: int) -> tuple[float, float]:
        if group_size > 1 and not has_group_law(events, self.adjacency):
            return self._generic_group_bounds(events, delta, group_size)
        if group_size == 1 and self.adjacency != "replace_one":
            running = self._running_at(delta).bounds(events)
            if running is not None:
                return running
        key = ("epsilon", tuple(events), delta, group_size, self.adjacency)
        return self._remember(key, lambda: self._certified(events, delta, group_size))

    def _certified(self, events: Sequence[Event], delta: float, group_size: int) -> tuple[float, float]:
        lower, upper = pld.epsilon_bounds(events, delta, self.adjacency, group_size)
        if math.isinf(upper) or upper - lower > 0.01 * upper:
            # Far from what is aimed at: both are certified, so the smaller one is.
            upper = min(upper, self._rdp(events).get_epsilon(delta, group_size))
        return lower, max(lower, upper)

    def _running_at(self, delta: float) -> Running:
        """What is kept of the composition for the last few δ that were asked for."""
        if delta not in self._running:
            while len(self._running) >= 4:
                self._running.pop(next(iter(self._running)))
            self._running[delta] = Running(delta)
        return self._running[delta]

    def _delta_bounds(self, events: Sequence[Event], epsilon: float) -> tuple[float, float]:
        key = ("delta", tuple(events), epsilon, self.adjacency)
        return self._remember(key, lambda: pld.delta_bounds(events, epsilon, self.adjacency))

    def _rdp(self, events: Sequence[Event]) -> RDPAccountant:
        other = RDPAccountant(self.adjacency)
        for release, count in events:
            other.add(release, count)
        return other

    def _remember(self, key: tuple, compute) -> tuple[float, float]:
        """The last few answers: progress displays and budget checks ask for the same ones."""
        if key not in self._known:
            while len(self._known) >= 32:
                self._known.pop(next(iter(self._known)))
            self._known[key] = compute()
        return self._known[key]
