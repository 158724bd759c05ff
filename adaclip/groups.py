"""Label groups: which group has the smallest gradients, released with noise, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaclip.clipping.base import Setting, SplitRelease, check_norm, check_tensors

__all__ = ["LabelGroups"]

_USES = ("report", "reweight", "select")
# A state of this many numbers is kept and released in every step.
_MOST_CLASSES = 1_000_000
# Stands for 0 where it is divided by.
_LEAST = 1e-300


class LabelGroups(SplitRelease):
    """Group label selection: a side release (`adaclip.clipping.SideRelease`) per group of labels.

    Every example is in exactly one group, that of its label. Each step releases, for all G groups,

        H_c = sum_{b in c} min(|g_b|, C)/C + N(0, sigma_s^2)   (a rule that is not a threshold: |c_b g_b|/C)
        n_c = |{b in c}| + N(0, sigma_n^2)

    over all samples of the batch, whatever their weight, except those whose gradient is not finite. An example
    adds at most 1 to one entry of H and 1 to one of n, so both cost sigma_s^-2 + sigma_n^-2 of the step's
    sigma^-2, together. (Replacing an example by one of another group moves two entries; the ledger's law is for
    any two contributions of norm 1.) A raw argmin, or one of raw sums, would tell near a tie who was there.

    Moving averages of the released H and n give ratios H_c / max(n_c, floor); the group with the least ratio,
    among those whose count reaches the floor (all, if none does), is selected for the next step. That is
    post-processing. What the selection is used for:

    - "report": nothing but the report.
    - "reweight": samples of the selected group have the weight `weight` in the clip, min(w, C/|g|).
    - "select": the next step trains on the selected group only. The literal reading of the scheme; it
      tends to stay with one group, and loses most of the signal. The first step takes all groups.

    A weight is a function of released numbers and of the sample's own label, and at most 1: what an example adds
    to the gradient stays bounded by C.

    Labels come from the private loader's batches, so rows must reach the model in the loader's order, as they
    must for padding: in another order an example would be counted under its neighbor's label, and could
    move two groups.

    Args:
        use: "report", "reweight" or "select".
        groups: the number of classes, each a group of its own, or the group of each class: a sequence, or a
          mapping from all labels 0 … L-1. Public: it is not read off the data.
        sigma_s, sigma_n: noise standard deviation on every entry of H and of n.
        floor: tau > 0; None: twice the noise that the averaged counts still have, and at least 1.
        weight: of the selected group under "reweight", in (0, 1].
        memory: weight of the past in the moving averages, in [0, 1).
        diagnostics: keep the last batch's sums without noise in `private`.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """

    def __init__(
        self,
        use: str = "report",
        *,
        groups: int | Sequence[int] | Mapping[int, int],
        sigma_s: float = 40.0,
        sigma_n: float = 40.0,
        floor: float | None = None,
        weight: float = 0.5,
        memory: float = 0.9,
        diagnostics: bool = False,
    ):
        if not isinstance(use, str) or use not in _USES:
            raise ValueError(f"use must be one of {_USES}, got {use!r}")
        self.use = use
        self._classes = _table(groups)
        self.count = max(self._classes) + 1
        self.sigma_s, self.sigma_n = check_norm(sigma_s, "sigma_s"), check_norm(sigma_n, "sigma_n")
        if isinstance(memory, bool) or not isinstance(memory, (int, float)) or not 0 <= memory < 1:
            raise ValueError(f"memory must be in [0, 1), got {memory!r}")
        self.memory = float(memory)
        left = self.sigma_n * math.sqrt((1 - self.memory) / (1 + self.memory))
        self.floor = max(1.0, 2 * left) if floor is None else check_norm(floor, "floor")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= 1:
            raise ValueError(f"weight must be in (0, 1], got {weight!r}")
        self.weight = float(weight)
        self.diagnostics = bool(diagnostics)
        self.width = 2 * self.count
        self._allocate(torch.device("cpu"))

    def _allocate(self, device: torch.device) -> None:
        made = {"dtype": torch.float64, "device": device}
        self._table = torch.tensor(self._classes, device=device)
        self._average = torch.zeros(self.width, **made)
        # How much of the averages is there: 1 - memory^t. And again, above 0, where the device reads it.
        self._filled = 0.0
        self._share = torch.full((), _LEAST, **made)
        self._weights = torch.ones(self.count, **made)
        self._selected = torch.full((), -1, device=device)
        # What was released last, once there was a release, and its sums without noise, once those are kept.
        self._last = torch.zeros(self.width, **made)
        self._step: int | None = None
        self._sums: Tensor | None = None
        self._raw = torch.zeros(self.width, **made)
        self._kept = False

    def bind(self, setting: Setting) -> None:
        """Make the state, on the device of the norms. Called once, before training."""
        self._allocate(setting.device)

    @property
    def classes(self) -> int:
        """L: labels are 0 … L-1."""
        return len(self._classes)

    @property
    def sensitivities(self) -> tuple[tuple[float, float], ...]:
        return ((1.0, self.sigma_s), (1.0, self.sigma_n))

    def stds(self) -> list[float]:
        return [self.sigma_s] * self.count + [self.sigma_n] * self.count

    def outputs(self, sums: Tensor) -> dict[str, Tensor]:
        self._sums = sums
        return {
            "table": self._table,
            "group_sums": sums[: self.count],
            "group_counts": sums[self.count :],
        }

    @torch.no_grad()
    def prepare(self, t: int) -> None:
        self._step, self._kept = t, self.diagnostics and self._sums is not None
        self._filled = self.memory * self._filled + (1 - self.memory)
        self._share.fill_(max(self._filled, _LEAST))

    @torch.no_grad()
    def take_in(self, released: Tensor) -> None:
        if self.diagnostics and self._sums is not None:
            self._raw.copy_(self._sums)
        self._last.copy_(released)
        self._average.mul_(self.memory).add_(released, alpha=1 - self.memory)
        ratios, counts = self._ratios()
        there = counts >= self.floor
        candidates = torch.where(there | ~there.any(), ratios, ratios.new_full((), math.inf))
        self._selected.copy_(candidates.argmin())
        if self.use == "report":
            return
        mine = torch.arange(self.count, device=ratios.device) == self._selected
        chosen, others = (self.weight, 1.0) if self.use == "reweight" else (1.0, 0.0)
        self._weights.copy_(mine * chosen + ~mine * others)

    def _ratios(self) -> tuple[Tensor, Tensor]:
        """H_c / max(n_c, floor) and n_c, both [G], from the averages of what was released."""
        sums, counts = (self._average / self._share).split(self.count)
        return sums / counts.clamp_min(self.floor), counts

    def weights(self, labels: Tensor, real: int | Tensor) -> Tensor | None:
        """The weights of a physical batch's samples in the clip, float64 [B]; None: 1 each.

        labels: int64 [B], on the device of the norms; those from row `real` on are padding, of weight 0.
        real: a number, or an int64 tensor [1] on that device.

        Raises:
            ValueError: a label without a group (on the CPU; on a device such a sample has weight 0).
        """
        if self.use == "report":
            return None
        sample = torch.arange(len(labels), device=labels.device) < real
        known = sample & (labels >= 0) & (labels < len(self._table))
        if labels.device.type == "cpu" and not torch.equal(known, sample):
            bad = labels[sample & ~known].tolist()
            raise ValueError(
                f"labels must be in [0, {len(self._table)}), the classes that have a group, got {bad}"
            )
        group = self._table[torch.where(known, labels, torch.zeros_like(labels))]
        return torch.where(known, self._weights[group], self._weights.new_zeros(()))

    @property
    def selected(self) -> int | None:
        """The group selected by the last release; None before the first. Reads the device."""
        return None if self._step is None else int(self._selected)

    @property
    def released(self) -> dict[str, Any]:
        """What the last release let out, noise included: safe to publish. Empty before the first.

        sums, counts: float64 [G], of this release; ratios: float64 [G], of the averages; selected; step.
        """
        if self._step is None:
            return {}
        sums, counts = self._last.split(self.count)
        return {
            "sums": sums.clone(),
            "counts": counts.clone(),
            "ratios": self._ratios()[0],
            "selected": self.selected,
            "step": self._step,
        }

    @property
    def private(self) -> dict[str, Tensor]:
        """The last logical batch's sums and counts WITHOUT noise, float64 [G]: for debugging, never to publish.

        Empty without `diagnostics`. Not part of any state or checkpoint.
        """
        if not self._kept:
            return {}
        sums, counts = self._raw.split(self.count)
        return {"sums": sums.clone(), "counts": counts.clone()}

    def config(self) -> dict[str, Any]:
        """What identifies the release: plain JSON values. A checkpoint's must be equal."""
        return {
            "use": self.use,
            "groups": list(self._classes),
            "sigma_s": self.sigma_s,
            "sigma_n": self.sigma_n,
            "floor": self.floor,
            "weight": self.weight,
            "memory": self.memory,
        }

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step: released numbers only."""
        return {
            "average": self._average.clone(),
            "weights": self._weights.clone(),
            "selected": self._selected.clone(),
            "last": torch.zeros_like(self._last) if self._step is None else self._last.clone(),
            "filled": self._filled,
            "step": self._step,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError, with nothing changed, unless `state` can be loaded."""
        check_tensors(state, self.state_dict(), "groups state")
        for name in ("average", "last"):
            if not bool(state[name].isfinite().all()):
                raise ValueError(f"groups state {name} must be finite, got {state[name].tolist()}")
        weights, selected = state["weights"], int(state["selected"])
        if not bool(((weights >= 0) & (weights <= 1)).all()):
            raise ValueError(f"groups state weights must be in [0, 1], got {weights.tolist()}")
        if not -1 <= selected < self.count:
            raise ValueError(f"groups state selected must be in [-1, {self.count}), got {selected}")
        filled, step = state["filled"], state["step"]
        if not isinstance(filled, float) or not 0.0 <= filled <= 1.0:
            raise ValueError(f"groups state filled must be a number in [0, 1], got {filled!r}")
        if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
            raise ValueError(f"groups state step must be None or an integer of at least 0, got {step!r}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, which `check_state` has passed."""
        self._average.copy_(state["average"])
        self._weights.copy_(state["weights"])
        self._selected.copy_(state["selected"])
        self._filled, self._step, self._kept = state["filled"], state["step"], False
        self._share.fill_(max(self._filled, _LEAST))
        self._last.copy_(state["last"])


def _table(groups: int | Sequence[int] | Mapping[int, int]) -> list[int]:
    """The group of each class, groups numbered 0 … G-1 without a gap."""
    if (
        isinstance(groups, bool)
        or not isinstance(groups, (int, Sequence, Mapping))
        or isinstance(groups, str)
    ):
        raise TypeError(
            f"groups must be a number of classes, a sequence or a mapping, got {type(groups).__name__}"
        )
    if isinstance(groups, int):
        if not 1 <= groups <= _MOST_CLASSES:
            raise ValueError(f"groups must be at least 1 and at most {_MOST_CLASSES}, got {groups}")
        return list(range(groups))
    if isinstance(groups, Mapping):
        if groups.keys() != set(range(len(groups))):
            raise ValueError(f"groups must map every label from 0 on, got {list(groups)}")
        groups = [groups[label] for label in range(len(groups))]
    table = list(groups)
    if not all(isinstance(g, int) and not isinstance(g, bool) and g >= 0 for g in table):
        raise ValueError(f"groups must hold integers of at least 0, got {table}")
    # The largest number first: a range up to it could be longer than memory.
    if not table or max(table) >= len(table) or set(table) != set(range(max(table) + 1)):
        raise ValueError(f"groups must be numbered 0 to G-1, each with at least one class, got {table}")
    return table
