"""Budget: which releases an (epsilon, delta) still covers, by a rule that is valid for decisions made on the way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adaclip.accounting import Event, Ledger, Release
from adaclip.accounting.filters import RDPFilter
from adaclip.errors import PrivacyBudgetExceeded
from adaclip.ranges import holds

__all__ = ["Budget"]


class Budget:
    """An (epsilon, delta) that releases may spend. Asked before each of them.

    Two rules, one for each way of training:

    * **a plan**: releases fixed in advance, one by one, and certified as a whole by the accountant that
      calibrated them. Each of them is allowed, in order, and nothing else is. Training may end early, on
      whatever grounds: the whole plan is paid for. No accountant is asked on the way.
    * **a filter**, without a plan: a release is allowed if epsilon at delta, with the release, is within the
      budget by Rényi divergence at one order, fixed at the first question (`adaclip.accounting.filters`).
      Noise, sampling rate and the end of training may then depend on all that was released before (Feldman
      and Zrnic 2021, arXiv 2008.11193). A bound from privacy loss distributions is no such filter (arXiv
      2602.06756), however tight.

    Where a run is resumed behind what its ledger holds (`adaclip.runs`), the steps done again take their place in the
    plan, or in the filter's budget, a second time: training ends earlier, and neither is ever passed.

    A plan is not turned into a filter under way: the choice to depart from it could depend on what was
    released, and both rules' deltas would add up.

    Args:
        epsilon: > 0, finite.
        delta: in (0, 1).
        plan: (release, count) pairs in their order, at least one release; or None for the filter.

    Raises:
        ValueError: epsilon or delta out of range, an empty plan.
    """

    def __init__(self, epsilon: float, delta: float, plan: Sequence[Event] | None = None):
        if not holds(epsilon, lambda v: 0 < v < math.inf):
            raise ValueError(f"target_epsilon must be a positive finite number, got {epsilon!r}")
        if not holds(delta, lambda v: 0 < v < 1):
            raise ValueError(f"target_delta must be in (0, 1), got {delta!r}")
        self.epsilon, self.delta = float(epsilon), float(delta)
        # A ledger puts equal neighbors together, as the ledger that is compared does.
        self.plan: list[Event] | None = None if plan is None else _in_a_row(plan).events
        if self.plan == []:
            raise ValueError("a budget's plan must hold at least one release, got none")
        self.filter = None if plan is not None else RDPFilter(self.epsilon, self.delta)

    def check(self, spent: Ledger, release: Release) -> None:
        """Raise unless `release` may follow what `spent` holds.

        Raises:
            PrivacyBudgetExceeded: it would pass the budget, or is not the plan's next release.
        """
        if self.filter is None:
            self._check_plan(spent, release)
        else:
            self._check_filter(spent, release)

    def _check_plan(self, spent: Ledger, release: Release) -> None:
        left = _in_a_row(self.plan).after(_in_a_row(spent.events))
        if left == []:
            count = sum(event.count for event in self.plan)
            raise PrivacyBudgetExceeded(
                f"all {count} releases that the budget (epsilon {self.epsilon:g}, delta {self.delta:g}) was "
                "certified for are spent"
            )
        if left is None or left[0].release != release:
            planned = {event.release for event in self.plan}
            other = next((event.release for event in spent.events if event.release not in planned), release)
            raise PrivacyBudgetExceeded(
                f"the budget (epsilon {self.epsilon:g}, delta {self.delta:g}) was certified for "
                f"{_listed(self.plan)} and nothing else, got {other} after {spent.steps} steps: to change the noise "
                "or the sampling on the way, use make_private and set_budget, which an RDP filter decides"
            )

    def _check_filter(self, spent: Ledger, release: Release) -> None:
        after = self.filter.epsilon_after(spent, release)
        # A calibrated schedule lands on the target: leave room for the rounding of a sum of many steps.
        if not after <= self.epsilon * (1 + 1e-12):
            raise PrivacyBudgetExceeded(
                f"one more step would make epsilon {after:.6g} at delta {self.delta:g} (by the RDP filter), and the "
                f"budget is {self.epsilon:g}"
            )

    def continuing(self, saved: Budget | None) -> Budget:
        """The budget of a run that goes on from a checkpoint whose budget was `saved`: this one, on saved's terms.

        Raises:
            ValueError: saved has a plan, and this is not the same. Who departs from a plan does so in view of what
              was released.
        """
        if saved is None:
            return self
        if saved.plan is not None and saved != self:
            raise ValueError(
                f"budget must be the checkpoint's plan (epsilon {saved.epsilon:g}, delta {saved.delta:g}), which is "
                f"not left on the way, got epsilon {self.epsilon:g}, delta {self.delta:g} with another plan or none"
            )
        # A filter's order is chosen once. If this run has chosen one, it goes on with it.
        unused = self.filter is not None and self.filter.state_dict()["order"] is None
        return saved if unused and saved == self else self

    def state_dict(self) -> dict[str, Any]:
        """Plain values: the plan as a ledger, or the filter with its terms."""
        plan = None if self.plan is None else _in_a_row(self.plan).state_dict()
        kept = None if self.filter is None else self.filter.state_dict()
        return {"epsilon": self.epsilon, "delta": self.delta, "plan": plan, "filter": kept}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Budget:
        """The budget that `state_dict` described; ValueError if it is damaged."""
        if not isinstance(state, Mapping) or not {"epsilon", "delta", "plan", "filter"} <= state.keys():
            raise ValueError(f"a budget's state must have epsilon, delta, plan and filter, got {state!r}")
        plan = state["plan"]
        if (plan is None) == (state["filter"] is None):
            raise ValueError("a budget must have either a plan or a filter")
        if plan is None:
            budget = cls(state["epsilon"], state["delta"])
            try:
                budget.filter = RDPFilter.from_state_dict(state["filter"])
            except TypeError as error:
                raise ValueError(f"a budget's {error}") from error
            return budget
        return cls(state["epsilon"], state["delta"], Ledger.from_state_dict(plan).events)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Budget):
            return NotImplemented
        return (self.epsilon, self.delta, self.plan) == (other.epsilon, other.delta, other.plan)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Budget(epsilon={self.epsilon}, delta={self.delta}, plan={self.plan})"


def _in_a_row(events: Iterable[Event]) -> Ledger:
    """Events as a ledger, under an adjacency that has a guarantee for all kinds: for comparisons only."""
    return Ledger(events, adjacency="zero_out")


def _listed(plan: list[Event]) -> str:
    """Three events of the plan at most, in words."""
    shown = ", then ".join(f"{count} releases of {release}" for release, count in plan[:3])
    return shown + (f", and {len(plan) - 3} more kinds" if len(plan) > 3 else "")
