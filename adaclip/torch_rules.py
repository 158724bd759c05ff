"""How each optimizer that the fused pass knows begins a parameter's step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .smoothing.disk import DiSK
from .smoothing.nadam import DPAdamBC, NoiseCorrectedNadam
from .step_rule import StepRule, StepState

__all__ = ["RULES"]


def _sgd(optimizer: torch.optim.Optimizer, group: dict, p: Tensor, std: float | None) -> StepState:
    sign = -1.0 if group["maximize"] else 1.0
    lr, mu, l2 = group["lr"], group["momentum"], group["weight_decay"]
    if mu == 0:
        return StepState(None, None, StepRule(sign, l2, direct=lr))
    state = optimizer.state[p]
    momentum = state.get("momentum_buffer")
    # torch begins with the gradient itself, undamped.
    decay, keep = (mu, 1 - group["dampening"]) if momentum is not None else (0.0, 1.0)
    if momentum is None:
        momentum = state["momentum_buffer"] = torch.zeros_like(p)
    direct, follow = (lr, lr * mu) if group["nesterov"] else (0.0, lr)
    rule = StepRule(sign, l2, decay=decay, keep=keep, direct=direct, follow=follow)
    return StepState(momentum, None, rule)


def _adaptive(optimizer: torch.optim.Optimizer, group: dict, p: Tensor, std: float | None) -> StepState:
    nadam = isinstance(optimizer, torch.optim.NAdam)
    state = optimizer.state[p]
    if len(state) == 0:
        scalar = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        state["step"] = torch.tensor(0.0, dtype=scalar)
        if nadam:
            state["mu_product"] = torch.tensor(1.0, dtype=scalar)
        state["exp_avg"] = torch.zeros_like(p)
        state["exp_avg_sq"] = torch.zeros_like(p)
    state["step"] += 1
    t, lr, (beta1, beta2) = state["step"].item(), group["lr"], group["betas"]
    if nadam:
        psi = group["momentum_decay"]
        mu, mu_next = (beta1 * (1.0 - 0.5 * 0.96 ** (s * psi)) for s in (t, t + 1))
        state["mu_product"] *= mu
        product = state["mu_product"].item()
        direct, follow = lr * (1 - mu) / (1 - product), lr * mu_next / (1 - product * mu_next)
    else:
        direct, follow = 0.0, lr / (1 - beta1**t)
    decoupled = group["decoupled_weight_decay"]
    shrink, l2 = (1 - lr * group["weight_decay"], 0.0) if decoupled else (1.0, group["weight_decay"])
    rule = StepRule(
        sign=-1.0 if group["maximize"] else 1.0,
        l2=l2,
        shrink=shrink,
        decay=beta1,
        keep=1 - beta1,
        direct=direct,
        follow=follow,
        square_decay=beta2,
        square_keep=1 - beta2,
        scale=(1 - beta2**t) ** -0.5,
        eps=group["eps"],
    )
    return StepState(state["exp_avg"], state["exp_avg_sq"], rule)


# Each begins a parameter's step: it counts the step in optimizer.state, where it makes what is missing. The standard
# deviation is None where only the device knows it.
RULES: dict[type, Callable[[torch.optim.Optimizer, dict, Tensor, float | None], StepState]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adaptive,
    torch.optim.AdamW: _adaptive,
    torch.optim.NAdam: _adaptive,
    NoiseCorrectedNadam: NoiseCorrectedNadam.fused_state,
    DPAdamBC: DPAdamBC.fused_state,
    DiSK: DiSK.fused_state,
}
