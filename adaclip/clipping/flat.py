"""Flat clipping: one norm over all parameters."""

from __future__ import annotations

from typing import Any

import torch

from adaclip.clipping.base import Clipping, Setting, check_norm
from adaclip.schedules import Schedule, check_schedule

__all__ = ["FlatClipping"]


class FlatClipping(Clipping):
    """One norm over all parameters (Abadi et al. 2016, arXiv 1607.00133).

    Releases the noisy clipped sum, to which one example adds at most C in norm; the noise has standard
    deviation sigma C on every coordinate, and sigma is the whole noise multiplier: nothing is split.

    Args:
        max_grad_norm: C, or C_0 with a schedule.
        schedule: C_t = C_0 times schedule(t), a public function of the release's number t
          (`adaclip.schedules`). The noise follows. None: C stays.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """

    name = "flat"

    def __init__(self, max_grad_norm: float = 1.0, schedule: Schedule | None = None):
        self._initial = check_norm(max_grad_norm)
        self._schedule = check_schedule(schedule, "schedule")
        self.thresholds = torch.tensor([self._initial], dtype=torch.float64)

    def bind(self, setting: Setting) -> int:
        self.thresholds = torch.tensor([self._initial], dtype=torch.float64, device=setting.device)
        return 1

    def begin(self, t: int) -> None:
        if self._schedule is not None:
            self.thresholds.fill_(self._initial * self._schedule(t))

    def config(self) -> dict[str, Any]:
        schedule = None if self._schedule is None else self._schedule.state_dict()
        return {"name": self.name, "max_grad_norm": self._initial, "schedule": schedule}
