"""The physical batches that the Poisson loader has planned, on their way through torch's DataLoader."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

__all__ = ["Part", "PlannedBatches"]


class Part(NamedTuple):
    """A physical batch that has been planned: which examples, and where in its logical batch it stands."""

    indices: np.ndarray
    step: int
    first: bool
    last: bool


class PlannedBatches:
    """The batch sampler given to torch's DataLoader: hands out index lists and notes what was handed out."""

    def __init__(self) -> None:
        self._plan: Iterator[Part] = iter(())
        self._sent: deque[Part] = deque()

    def start(self, plan: Iterator[Part]) -> deque[Part]:
        """Set the plan of the next epoch; return the queue in which its parts appear as they are sent."""
        self._plan, self._sent = plan, deque()
        return self._sent

    def __iter__(self) -> Iterator[list[int]]:
        return self._send(self._plan, self._sent)

    def _send(self, plan: Iterator[Part], sent: deque[Part]) -> Iterator[list[int]]:
        for part in plan:
            sent.append(part)
            # No collate function can make a batch of nothing: an empty one travels as a placeholder example,
            # through the same worker queue (so the order holds), and is zeroed on arrival.
            yield part.indices.tolist() or [0]
