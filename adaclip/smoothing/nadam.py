"""Nadam on noisy gradients whose noise is known: its variance is removed from the second moment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaclip.ranges import holds
from adaclip.step_rule import NoiseTerms, StepRule, StepState

__all__ = ["DPAdamBC", "NoiseCorrectedNadam"]


class NoiseCorrectedNadam(torch.optim.Optimizer):
    """Nadam with the noise's own variance taken out of the second moment, above a floor that follows the noise.

    With g_t the noisy gradient and std_t the noise in each of its elements (t = 1, 2, ...):

        m_t = beta1 m_{t-1} + (1 - beta1) g_t        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
        n_t = beta2 n_{t-1} + (1 - beta2) std_t^2    (an average like v, because std_t changes with C_t)
        move = beta1 m_t / (1 - beta1^{t+1}) + (1 - beta1) g_t / (1 - beta1^t)     (nesterov; else m_t / (1 - beta1^t))
        divisor = sqrt(max((v_t - n_t) / (1 - beta2^t), (floor std_t)^2, absolute_floor^2)) + eps
        param = (1 - lr weight_decay) param - lr move / divisor

    E[v_t] is the true second moment plus n_t: plain Adam divides by the noise, and with the usual noise nearly by
    nothing else (Tang et al. 2023, arXiv 2312.14334). What is left after the subtraction can be near zero or below
    it; the floor, conditional on the noise of the step, bounds the length of a move there.

    Choosing `floor`: where floor std_t exceeds what is left, the update is momentum SGD in units of the noise, so
    the learning rate does not depend on C; with a floor near 1 or above that is most elements. A small floor gives
    Adam's own scaling, and needs a larger beta2 to keep the estimate of v above its error. A search over `floor`
    covers both.

    Privacy: none is spent. It reads p.grad after the noise is in it, parameters that were released, and public
    numbers; std_t is public because C_t is a function of what was released.

    Alone it is an ordinary torch optimizer: the group option `noise_std` says how much noise p.grad holds (0:
    none, and it is Nadam). Under a private engine the step passes the noise of every parameter itself (through
    `note_noise`, or in the fused pass), and `noise_std` is not used.

    Args:
        params: parameters or groups of them; every option may be set per group.
        lr: learning rate, at least 0.
        betas: decay of both averages, in [0, 1).
        eps: added to the divisor, at least 0.
        weight_decay: decoupled, at least 0.
        noise_std: standard deviation of the noise in each element of p.grad, finite and at least 0.
        floor: least divisor, in units of std_t.
        absolute_floor: least divisor, in units of the gradient. At least one of both floors must be above 0.
        nesterov: False gives Adam's move in place of Nadam's.

    Raises:
        ValueError: an option out of its range, and a group is then not added.

    State of each parameter: `step`, `exp_avg`, `exp_avg_sq`, and `noise_sq`, 0-dimensional float64: n_t.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        noise_std: float = 0.0,
        floor: float = 1.0,
        absolute_floor: float = 0.0,
        nesterov: bool = True,
    ):
        self._noise: dict[Tensor, float | Tensor] = {}
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "noise_std": noise_std,
            "floor": floor,
            "absolute_floor": absolute_floor,
            "nesterov": nesterov,
        }
        super().__init__(params, options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._noise = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch casts state to the parameter's dtype, and n_t must stay comparable to the last bit.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params, strict=True):
            if i in state_dict["state"]:
                noise_sq = state_dict["state"][i]["noise_sq"]
                self.state[p]["noise_sq"] = noise_sq.detach().clone().to(self.state[p]["noise_sq"].device)

    def note_noise(self, params: Sequence[Tensor], stds: Sequence[float] | Tensor) -> None:
        """Say how much noise the next step's gradients hold; without it the groups' `noise_std` holds.

        stds: one for each parameter, on the host or a tensor [len(params)] on the parameters' device.
        """
        self._noise = dict(zip(params, stds, strict=True))

    def fused_state(self, group: dict[str, Any], p: Tensor, std: float | Tensor | None) -> StepState:
        """Begin p's next step: count it, average its noise, and return what is to be done with its elements.

        std: None if it is known on p's device only, to a caller that averages it there, all parameters at once: then
          the noise is left alone, and the result says how `variance` and `floor_sq` are made of it.
        """
        state = self.state[p]
        if len(state) == 0:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
            device = p.device if std is None else std.device if isinstance(std, Tensor) else "cpu"
            state["noise_sq"] = torch.zeros((), dtype=torch.float64, device=device)
        state["step"] += 1
        t, lr, (beta1, beta2) = state["step"].item(), group["lr"], group["betas"]
        unbias, terms, variance, floor_sq = 1 / (1 - beta2**t), None, 0.0, 0.0
        if std is None:
            terms = NoiseTerms(beta2, unbias, group["floor"], group["absolute_floor"])
        else:
            noise_sq = state["noise_sq"].mul_(beta2).add_((1 - beta2) * std * std)
        if isinstance(std, Tensor):
            variance = noise_sq * unbias
            floor_sq = ((group["floor"] * std) ** 2).clamp(min=group["absolute_floor"] ** 2)
        elif std is not None:
            variance = noise_sq.item() * unbias
            floor_sq = max(group["floor"] * std, group["absolute_floor"]) ** 2
        if group["nesterov"]:
            direct, follow = lr * (1 - beta1) / (1 - beta1**t), lr * beta1 / (1 - beta1 ** (t + 1))
        else:
            direct, follow = 0.0, lr / (1 - beta1**t)
        rule = StepRule(
            shrink=1 - lr * group["weight_decay"],
            decay=beta1,
            keep=1 - beta1,
            direct=direct,
            follow=follow,
            square_decay=beta2,
            square_keep=1 - beta2,
            scale=unbias,
            eps=group["eps"],
            variance=variance,
            floor_sq=floor_sq,
        )
        return StepState(state["exp_avg"], state["exp_avg_sq"], rule, terms)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update from p.grad, noise included; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    std = self._noise.get(p, group["noise_std"])
                    _apply(p, p.grad, *self.fused_state(group, p, std)[:3])
        self._noise = {}
        return loss


class DPAdamBC(NoiseCorrectedNadam):
    """DP-AdamBC (Tang et al. 2023, arXiv 2312.14334): Adam whose second moment is corrected for the noise.

        param -= lr m^ / sqrt(max(v^ - n^, gamma))

    The special case of `NoiseCorrectedNadam` without Nesterov's move, without eps, and with an absolute floor:
    gamma is in units of the gradient squared. The other arguments, the guarantee and the errors are as there.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        gamma: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        noise_std: float = 0.0,
    ):
        if not holds(gamma, lambda v: 0 < v < math.inf):
            raise ValueError(f"gamma must be finite and above 0, got {gamma!r}")
        super().__init__(
            params,
            lr,
            betas,
            0.0,
            weight_decay,
            noise_std=noise_std,
            floor=0.0,
            absolute_floor=math.sqrt(gamma),
            nesterov=False,
        )


def _check_options(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay", "noise_std", "floor", "absolute_floor"):
        if not holds(group[name], lambda v: 0 <= v < math.inf):
            raise ValueError(f"{name} must be finite and at least 0, got {group[name]!r}")
    betas = group["betas"]
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    if not pair or not all(holds(beta, lambda v: 0 <= v < 1) for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    if group["floor"] == 0 and group["absolute_floor"] == 0:
        raise ValueError(
            "floor or absolute_floor must be above 0: where the corrected second moment falls to 0, nothing else "
            "bounds the move"
        )


def _apply(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, rule: StepRule) -> None:
    m.mul_(rule.decay).add_(grad, alpha=rule.keep)
    v.mul_(rule.square_decay).addcmul_(grad, grad, value=rule.square_keep)
    divisor = (v * rule.scale - rule.variance).clamp_(min=rule.floor_sq).sqrt_().add_(rule.eps)
    move = (rule.direct * grad).add_(m, alpha=rule.follow)
    p.mul_(rule.shrink).sub_(move.div_(divisor))
