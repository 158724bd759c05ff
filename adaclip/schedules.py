"""Schedules: public functions of the release's number that scale the clipping norm or the noise.

A schedule is fixed before training and sees nothing of the data, so it costs no privacy in itself; each
step is booked with the noise it uses. `schedule(t)` is a positive factor for release t = 0, 1, …; after
its `length` it stays where it is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from adaclip.ranges import MAX_FLOAT

__all__ = ["Cosine", "Exponential", "Linear", "Piecewise", "Schedule", "check_schedule", "schedule_from_dict"]


class Schedule(ABC):
    """Base of the schedules; subclasses are frozen dataclasses of plain numbers."""

    @abstractmethod
    def __call__(self, t: int) -> float:
        """The factor for release t >= 0; positive and finite."""

    @property
    @abstractmethod
    def length(self) -> int:
        """From this release on the factor stays the same."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values; `schedule_from_dict` makes the schedule of them."""
        return {"kind": type(self).__name__.lower(), **asdict(self)}


@dataclass(frozen=True)
class _Ramp(Schedule):
    """From `start` at release 0 to `end` at release `steps`, both positive; `steps` >= 1."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", _factor(self.start, "start"))
        object.__setattr__(self, "end", _factor(self.end, "end"))
        _count(self.steps, "steps", 1)

    def __call__(self, t: int) -> float:
        done = min(_count(t, "t", 0), self.steps) / self.steps
        # The ends exactly, and nothing beyond them by rounding.
        if done in (0.0, 1.0):
            return self.end if done else self.start
        low, high = sorted((self.start, self.end))
        return min(max(self._at(done), low), high)

    @abstractmethod
    def _at(self, done: float) -> float:
        """The factor when that part of the way, in [0, 1), is done."""

    @property
    def length(self) -> int:
        return self.steps


@dataclass(frozen=True)
class Linear(_Ramp):
    """start + (end - start) t/steps."""

    def _at(self, done: float) -> float:
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class Exponential(_Ramp):
    """start (end/start)^(t/steps)."""

    def _at(self, done: float) -> float:
        return math.exp((1.0 - done) * math.log(self.start) + done * math.log(self.end))


@dataclass(frozen=True)
class Cosine(_Ramp):
    """end + (start - end) (1 + cos(pi t/steps))/2."""

    def _at(self, done: float) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Piecewise(Schedule):
    """Constant pieces: ((0, factor), (step, factor), …); a piece's factor holds from its step on.

    Steps are increasing integers, the first of them 0; factors positive.
    """

    pieces: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        if not isinstance(self.pieces, Sequence) or not self.pieces:
            raise ValueError(f"pieces must be (step, factor) pairs, got {self.pieces!r}")
        checked = []
        for i, piece in enumerate(self.pieces):
            if not isinstance(piece, Sequence) or len(piece) != 2:
                raise ValueError(f"pieces[{i}] must be a (step, factor) pair, got {piece!r}")
            checked.append(
                (_count(piece[0], f"pieces[{i}] step", 0), _factor(piece[1], f"pieces[{i}] factor"))
            )
        steps = [step for step, _ in checked]
        if steps[0] != 0 or any(a >= b for a, b in pairwise(steps)):
            raise ValueError(f"pieces must begin at step 0 and be in increasing order, got steps {steps}")
        object.__setattr__(self, "pieces", tuple(checked))

    def __call__(self, t: int) -> float:
        at = bisect_right([step for step, _ in self.pieces], _count(t, "t", 0))
        return self.pieces[at - 1][1]

    @property
    def length(self) -> int:
        return self.pieces[-1][0]

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "piecewise", "pieces": [list(piece) for piece in self.pieces]}


_KINDS = {kind.__name__.lower(): kind for kind in (Linear, Exponential, Cosine, Piecewise)}


def schedule_from_dict(state: Mapping[str, Any]) -> Schedule:
    """The schedule that `state_dict` described. Raises ValueError if it is none."""
    values = dict(state) if isinstance(state, Mapping) else {}
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"schedule kind must be one of {sorted(_KINDS)}, got {kind!r}")
    try:
        return _KINDS[kind](**values)
    except TypeError as error:
        raise ValueError(f"a {kind} schedule cannot be made of {values}: {error}") from error


def check_schedule(schedule: Schedule | None, name: str) -> Schedule | None:
    """The schedule; TypeError unless it is one of this module's, or None."""
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(f"{name} must be an adaclip.schedules object or None, got {schedule!r}")
    return schedule


def _factor(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_FLOAT:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return float(value)


def _count(value: int, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return value
