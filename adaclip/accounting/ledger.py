"""The ledger: what was released, as data. Accountants turn it into ε; it knows no formula.

An event ``(release, count)`` stands for ``count`` equal releases in a row (``adaclip.accounting.releases``). Equal
neighbors are stored once, so a training run with fixed noise is a single event however long it was. A ledger is kept
for one adjacency: what "one example" means in its guarantee.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adaclip.accounting import checks
from adaclip.accounting.releases import (
    ADJACENCIES,
    Event,
    Release,
    SubsampledGaussian,
    checked_event,
    event_pairs,
    release_from_dict,
    release_to_dict,
)
from adaclip.files import replace_file

SCHEMA = 2


class Ledger:
    """Run-length list of events in the order they happened, under one adjacency.

    Only ever appended to: entries but the last never change. ``len(ledger)`` is the number of runs. Two ledgers are
    equal when their events and adjacencies are.

    Args:
        events: (release, count) pairs, checked as by ``append``.
        adjacency: ``"add_remove"``, ``"replace_one"`` or ``"zero_out"``.
    """

    def __init__(self, events: Iterable[tuple[Release, int]] = (), adjacency: str = "add_remove") -> None:
        self._adjacency = checks.one_of("adjacency", adjacency, ADJACENCIES)
        self._events: list[Event] = []
        for release, count in event_pairs("events", events):
            self.append(release, count)

    @property
    def adjacency(self) -> str:
        """The neighboring relation of the guarantee."""
        return self._adjacency

    def append(self, release: Release, count: int = 1) -> None:
        """Book ``count`` releases; 0 books nothing.

        Raises:
            ValueError: the kind of sampling has no guarantee under the ledger's adjacency; count out of range.
            TypeError: not a release, or a count that is no integer. Nothing is booked in either case.
        """
        event = checked_event(release, count, self._adjacency)
        if event.count:
            extend(self._events, event)

    def merge(self, other: Ledger) -> None:
        """Append another ledger's events (a resumed run's, or another run's on the same data).

        Raises:
            ValueError: it is of another adjacency, or a merged count passes 2**53; nothing is booked.
        """
        if other._adjacency != self._adjacency:
            raise ValueError(
                f"a ledger merged into one of adjacency {self._adjacency!r} must have that adjacency, "
                f"got {other._adjacency!r}: their guarantees are about different neighbors"
            )
        merged = list(self._events)
        for event in other.events:
            extend(merged, event)
        self._events[:] = merged

    def after(self, earlier: Ledger) -> list[Event] | None:
        """The events of this ledger that follow ``earlier``'s; None if it does not begin with them.

        None as well if the adjacencies differ.
        """
        if earlier._adjacency != self._adjacency:
            return None
        rest = list(self._events)
        for i, event in enumerate(earlier._events):
            last = i == len(earlier._events) - 1
            if not rest or rest[0].release != event.release or rest[0].count < event.count:
                return None
            if rest[0].count == event.count:
                rest.pop(0)
            elif last:
                rest[0] = rest[0]._replace(count=rest[0].count - event.count)
            else:
                return None
        return rest

    def longer(self, other: Ledger) -> Ledger:
        """Whichever of two records of one run continues the other; this one if they are equal.

        A ledger file that is written ahead of checkpoints and the ledger inside one of them are such records.

        Raises:
            ValueError: neither begins with the other: they are not of one run.
        """
        if self.after(other) is not None:
            return self
        if other.after(self) is not None:
            return other
        raise ValueError("the ledger and the checkpoint are of different runs: neither continues the other")

    @property
    def events(self) -> list[Event]:
        """A copy of the events, oldest first."""
        return list(self._events)

    @property
    def steps(self) -> int:
        """Number of ``SubsampledGaussian`` releases booked: training steps (epochs where batches are shuffled)."""
        return sum(event.count for event in self._events if isinstance(event.release, SubsampledGaussian))

    def __len__(self) -> int:
        return len(self._events)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ledger):
            return NotImplemented
        return self._adjacency == other._adjacency and self._events == other._events

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Ledger({[tuple(event) for event in self._events]}, adjacency={self._adjacency!r})"

    def state_dict(self) -> dict[str, Any]:
        """The ledger as plain dicts, lists, floats, ints and strings.

        Floats come back bit for bit, also through JSON (shortest repr); an infinite sigma is the string "inf", so that
        the JSON is standard.
        """
        return {
            "schema": SCHEMA,
            "adjacency": self._adjacency,
            "events": [{**release_to_dict(event.release), "count": event.count} for event in self._events],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Ledger:
        """The ledger that ``state_dict`` described.

        Raises:
            ValueError: not a ledger's state, one of another schema version, or a damaged event; the message says which
                event and what is wrong with it.
        """
        if not isinstance(state, Mapping) or "schema" not in state:
            raise ValueError(
                f"ledger state must be a mapping with 'schema' and 'events', got {_short(state)}"
            )
        if state["schema"] != SCHEMA:
            raise ValueError(
                f"ledger schema must be {SCHEMA}, got {state['schema']!r}: another version of adaclip wrote it"
            )
        if not isinstance(state.get("events"), list | tuple):
            raise ValueError(f"ledger events must be a list, got {_short(state.get('events'))}")
        try:
            ledger = cls(adjacency=state.get("adjacency"))  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"ledger {error}") from None
        for i, entry in enumerate(state["events"]):
            if not isinstance(entry, Mapping) or not {"release", "count"} <= entry.keys():
                raise ValueError(f"ledger event {i} must have release and count, got {_short(entry)}")
            try:
                ledger.append(release_from_dict({k: entry[k] for k in entry if k != "count"}), entry["count"])
            except (TypeError, ValueError) as error:
                raise ValueError(f"ledger event {i}: {error}") from None
        return ledger

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ledger to a JSON file atomically, and to disk: a crash leaves the old file or the new one.

        What is published after this returns is on the account, whatever happens.

        Raises:
            OSError: the file or its folder cannot be written; an existing file is unchanged.
        """
        text = json.dumps(self.state_dict(), indent=1, allow_nan=False) + "\n"
        replace_file(path, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ledger:
        """Read a ledger file.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not a ledger of this schema; the message names the file.
        """
        try:
            return cls.from_state_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            raise ValueError(f"{os.fspath(path)} is not a ledger this version can read: {error}") from error


def extend(events: list[Event], event: Event) -> None:
    """Append a checked event (count ≥ 1) to a run-length list.

    Raises:
        ValueError: the merged count passes 2**53; nothing is appended.
    """
    if events and events[-1].release == event.release:
        count = checks.integer("count", events[-1].count + event.count, 0)
        events[-1] = Event(event.release, count)
    else:
        events.append(event)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
