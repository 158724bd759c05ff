"""Clipping by parameter groups: every group of the optimizer has a norm of its own."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adaclip.clipping.base import NORM_KEY, Clipping, Setting, check_norm
from adaclip.clipping.per_layer import check_allocation

__all__ = ["PerGroupClipping", "has_norms", "norms_of"]


def has_norms(optimizer: torch.optim.Optimizer) -> bool:
    """Whether parameter groups of it carry a clipping norm.

    Some optimizers (LAMB, in several libraries) have a hyper-parameter of this name: it is in their defaults, and
    stays theirs.
    """
    return NORM_KEY not in optimizer.defaults and any(NORM_KEY in group for group in optimizer.param_groups)


def norms_of(groups: Iterable[Mapping[str, Any]]) -> list[float]:
    """C_k of each group; ValueError unless all have one, positive and finite."""
    norms = []
    for k, group in enumerate(groups):
        if NORM_KEY not in group:
            raise ValueError(
                f"every parameter group must have a {NORM_KEY!r} where one has, but param_groups[{k}] has none"
            )
        norms.append(check_norm(group[NORM_KEY], f"param_groups[{k}][{NORM_KEY!r}]"))
    return norms


class PerGroupClipping(Clipping):
    """A norm C_k for every parameter group k of the optimizer: `{"params": …, "lr": …, "max_grad_norm": C_k}`.

    Per-layer clipping (McMahan et al. 2018, arXiv 1710.06963) with groups in the place of layers: a step releases
    K noisy clipped sums, to which one example adds at most C_k in norm. Of these K groups some may be frozen; of the
    K' that are not, group k gets the noise std_k = sigma_g g_k sqrt(sum_j C_j^2/g_j^2), the sum over those K', so
    that sum_k (C_k/std_k)^2 = 1/sigma_g^2. Nothing is released beside the sums, and sigma_g = sigma.

    The norms are read from the groups when a logical batch begins: a norm that is changed later, as a scheduler
    would, a group that is added, or a parameter that moves to another group, counts from the next logical batch on.
    They must be public: functions of what was released at most, as learning rates are. A parameter that is
    unfrozen belongs to its group as before.

    A sample with a non-finite gradient in one group contributes to none.

    Args:
        allocation: "threshold", g_k = C_k: std_k = sigma_g C_k sqrt(K'), each group has the same signal-to-noise
          ratio at its threshold. "equal", g_k = 1: the same noise, sigma_g sqrt(sum_j C_j^2), in every group.

    Raises:
        ValueError: an argument is wrong; in `bind` and `begin`: a group has no norm, or not a positive finite one.
    """

    name = "per_group"

    def __init__(self, allocation: str = "threshold"):
        self._allocation = check_allocation(allocation)
        # Unknown until `bind` has seen the groups.
        self.thresholds = torch.zeros(0, dtype=torch.float64)

    def bind(self, setting: Setting) -> int:
        if setting.param_groups is None:
            raise ValueError("per-group clipping needs the optimizer's parameter groups")
        self._param_groups: Callable[[], list[dict[str, Any]]] = setting.param_groups
        self._norms: list[float] = []
        self.thresholds = torch.zeros(0, dtype=torch.float64, device=setting.device)
        self._read()
        return len(self._norms)

    def check_groups(self, groups: list[dict[str, Any]], defaults: dict[str, Any]) -> None:
        norms_of(groups)

    def begin(self, t: int) -> None:
        self._read()

    def _read(self) -> None:
        groups = self._param_groups()
        norms = norms_of(groups)
        self._group_of: dict[nn.Parameter, int] = {
            p: k for k, group in enumerate(groups) for p in group["params"]
        }
        if norms == self._norms:
            return
        self._norms = norms
        made = torch.tensor(norms, dtype=torch.float64)
        if len(norms) == len(self.thresholds):
            # In place: a captured graph reads them there.
            self.thresholds.copy_(made)
        else:
            self.thresholds = made.to(self.thresholds.device)

    def group_of(self, parameter: nn.Parameter) -> int:
        if parameter not in self._group_of:
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} was given to the optimizer within a logical batch, "
                "whose norms are fixed: call optimizer.step() or optimizer.zero_grad() first"
            )
        return self._group_of[parameter]

    def agreed(self) -> int:
        return zlib.crc32(repr(self._norms).encode(), super().agreed())

    def noise_scale(self) -> Tensor:
        """float64 [K]: g_k sqrt(sum_j C_j^2/g_j^2), j over the groups with a parameter that is trained now.

        Groups without one release nothing; their entries are positive.
        """
        trained = {k for p, k in self._group_of.items() if p.requires_grad}
        if not trained:
            return self.thresholds.clone()
        if self._allocation == "threshold":
            return self.thresholds * math.sqrt(len(trained))
        # Of the thresholds that clip, whatever the groups say by now.
        whole = torch.linalg.vector_norm(torch.stack([self.thresholds[k] for k in sorted(trained)]))
        return whole.expand_as(self.thresholds)

    def config(self) -> dict[str, Any]:
        norms = norms_of(self._param_groups())
        return {"name": self.name, "max_grad_norm": norms, "allocation": self._allocation}

    def state_dict(self) -> dict[str, Any]:
        """The groups' norms as they are now, which are in their `param_groups` as well."""
        norms = norms_of(self._param_groups())
        return {"thresholds": torch.tensor(norms, dtype=torch.float64, device=self.thresholds.device)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: the norms are the parameter groups', and `config` says whether they are those of the state."""
