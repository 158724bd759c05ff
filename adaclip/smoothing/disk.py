"""DiSK: a simplified Kalman filter over noisy gradients, with a look-ahead point to evaluate them at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from adaclip.ranges import holds
from adaclip.step_rule import StepRule, StepState

__all__ = ["DiSK"]


class DiSK(torch.optim.Optimizer):
    """DiSK (Zhang et al. 2024, arXiv 2410.03883) in the form that needs one gradient a step.

        filtered_t = (1 - kappa) filtered_{t-1} + kappa g_t        (filtered_1 = g_1)
        param_{t+1} = param_t - lr filtered_t

    where g_t is to be the gradient at param_t + gamma (param_t - param_{t-1}), gamma = (1 - kappa) / kappa: the
    filter predicts the next gradient from the last move, and this gamma makes the prediction's two gradients one.
    `adaclip.smoothing.EvaluationPoint` puts the model there (a private engine does so by itself); without it the
    optimizer is an exponential filter, the momentum that it was compared with.

    Privacy: none is spent. The filter is post-processing of noisy gradients; the point is a function of parameters
    that were released, and the gradients there are clipped like any others.

    Args:
        params: parameters or groups of them; every option may be set per group.
        lr: learning rate, at least 0.
        kappa: gain of the filter, in (0, 1]; 1 is SGD.
        weight_decay: added to the gradient as weight_decay * param, at least 0.
        lookahead: whether there is an evaluation point; False leaves the filter alone.

    Raises:
        ValueError: an option out of its range, and a group is then not added.

    State of each parameter: `momentum_buffer`, the filtered gradient, and `step_size`, the lr of the last move.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        kappa: float = 0.7,
        weight_decay: float = 0.0,
        *,
        lookahead: bool = True,
    ):
        options = {"lr": lr, "kappa": kappa, "weight_decay": weight_decay, "lookahead": lookahead}
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        options = {**self.defaults, **param_group}
        for name in ("lr", "weight_decay"):
            if not holds(options[name], lambda v: 0 <= v < math.inf):
                raise ValueError(f"{name} must be finite and at least 0, got {options[name]!r}")
        if not holds(options["kappa"], lambda v: 0 < v <= 1):
            raise ValueError(f"kappa must be in (0, 1], got {options['kappa']!r}")
        super().add_param_group(param_group)

    def lookahead(self, group: dict[str, Any], p: Tensor) -> tuple[Tensor, float] | None:
        """(direction, length): p's evaluation point is p + length * direction. None: it is p itself."""
        state = self.state.get(p)
        if not state or not group["lookahead"] or group["kappa"] == 1:
            return None
        gamma = (1 - group["kappa"]) / group["kappa"]
        return state["momentum_buffer"], -gamma * state["step_size"]

    def fused_state(self, group: dict[str, Any], p: Tensor, std: float | Tensor | None) -> StepState:
        """Begin p's next step and return what is to be done with its elements. The noise does not matter."""
        state = self.state[p]
        first = len(state) == 0
        if first:
            state["momentum_buffer"] = torch.zeros_like(p)
        lr, kappa = group["lr"], group["kappa"]
        state["step_size"] = lr
        decay, keep = (0.0, 1.0) if first else (1 - kappa, kappa)
        rule = StepRule(l2=group["weight_decay"], decay=decay, keep=keep, follow=lr)
        return StepState(state["momentum_buffer"], None, rule)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update from p.grad; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    filtered, _, rule, _ = self.fused_state(group, p, 0.0)
                    filtered.mul_(rule.decay).add_(p.grad.add(p, alpha=rule.l2), alpha=rule.keep)
                    p.sub_(filtered, alpha=rule.follow)
        return loss
