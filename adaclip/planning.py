"""The noise of a planned run: what its schedule is scaled by, so that all of it meets an (epsilon, delta)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from adaclip.accounting import Accountant, Event, SubsampledGaussian, calibrate_noise, create_accountant
from adaclip.accounting.ledger import extend
from adaclip.schedules import Piecewise, Schedule

__all__ = ["calibrate_schedule", "planned_events", "planned_releases", "quantized"]

_MOST_VALUES = 32
_TOLERANCE = 3e-4  # epsilon may stay below its target by this part
_WIDTH = 1e-6  # relative width of sigma's bracket at which a jump of the bound is accepted


def planned_releases(epochs: int | None, steps: int | None, steps_per_epoch: int, sampling: str) -> int:
    """How many releases a run of so many epochs or logical steps books; exactly one of the two is given.

    Shuffled batches book one an epoch, also where the last one is not finished.

    Raises:
        ValueError: both or none given, or not a positive integer.
    """
    if (epochs is None) == (steps is None):
        raise ValueError(f"exactly one of epochs and steps must be given, got {epochs=} and {steps=}")
    name, length = ("epochs", epochs) if steps is None else ("steps", steps)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"{name} must be a positive integer, got {length!r}")
    if sampling == "shuffled":
        return length if steps is None else math.ceil(length / steps_per_epoch)
    return length if epochs is None else length * steps_per_epoch


def quantized(schedule: Schedule, releases: int) -> Schedule:
    """The schedule itself if it takes at most 32 values in so many releases, else as 32 constant pieces.

    Each piece has the value of its middle. An accountant composes each value of the noise on its own.
    """
    if len({schedule(t) for t in range(releases)}) <= _MOST_VALUES:
        return schedule
    starts = [releases * i // _MOST_VALUES for i in range(_MOST_VALUES + 1)]
    return Piecewise(tuple((start, schedule((start + end - 1) // 2)) for start, end in pairwise(starts)))


def planned_events(
    sigma: float, schedule: Schedule | None, releases: int, sample_rate: float, sampling: str
) -> list[Event]:
    """What a run of so many releases will book, equal neighbors together; sigma times the schedule's factor."""
    if schedule is None:
        return [Event(SubsampledGaussian(sample_rate, sigma, sampling), releases)]
    events: list[Event] = []
    for t in range(releases):
        extend(events, Event(SubsampledGaussian(sample_rate, sigma * schedule(t), sampling), 1))
    return events


def calibrate_schedule(
    *,
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str,
    adjacency: str,
    sampling: str,
    spent: Sequence[Event],
    schedule: Schedule | None,
) -> float:
    """`adaclip.accounting.calibrate_noise` for noise multipliers sigma times schedule(t), t = 0, …, steps - 1.

    Returns:
        sigma with target_epsilon (1 - 1e-3) <= epsilon <= target_epsilon by that accountant's upper bound for
        the whole list of releases; only the second is promised where calibrate_noise promises no more.

    Raises:
        ValueError, TypeError: as calibrate_noise.
    """
    even = calibrate_noise(
        target_epsilon=target_epsilon,
        delta=delta,
        sample_rate=sample_rate,
        steps=steps,
        accountant=accountant,
        adjacency=adjacency,
        sampling=sampling,
        spent=spent,
    )
    if schedule is None:
        return even

    def epsilon(sigma: float) -> float:
        account: Accountant = create_accountant(accountant, adjacency)
        for release, count in (*spent, *planned_events(sigma, schedule, steps, sample_rate, sampling)):
            account.add(release, count)
        return account.get_epsilon(delta)

    factors = [schedule(t) for t in range(steps)]
    # All of the noise at least, and at most, that of the even run; the bounds' own tolerance aside.
    good, bad = even / min(factors), even / max(factors)
    reached, missed = epsilon(good), epsilon(bad)
    while reached > target_epsilon:
        good *= 1.01
        reached = epsilon(good)
    tries = 0
    while good > bad * (1 + _WIDTH) and reached < target_epsilon * (1 - _TOLERANCE):
        tries += 1
        middle = math.sqrt(good * bad)
        if tries % 4 and 0 < reached < missed < math.inf:
            # log epsilon is nearly a straight line in log sigma; every fourth time the bracket is halved.
            slope = math.log(good / bad) / math.log(reached / missed)
            guess = good * (target_epsilon * (1 - _TOLERANCE / 2) / reached) ** slope
            middle = guess if bad < guess < good else middle
        value = epsilon(middle)
        if value <= target_epsilon:
            good, reached = middle, value
        else:
            bad, missed = middle, value
    return good
