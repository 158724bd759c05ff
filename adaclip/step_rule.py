"""The numbers of one parameter's update: core/noisy_step.h's StepRule, made by optimizers, read by the fused pass."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["StepRule", "StepState"]


class StepRule(NamedTuple):
    """With n the noisy gradient, an optimizer is a choice of numbers in

        g = sign n + l2 param
        momentum = decay momentum + keep g                        (if it has momentum)
        square = square_decay square + square_keep g^2            (if it has squares)
        move = direct g + follow momentum
        param = shrink param - move / divisor

    where the divisor is 1 without squares, sqrt(square) scale + eps with squares and a negative `floor_sq`, and
    else sqrt(max(square scale - variance, floor_sq)) + eps.

    `variance` and `floor_sq` may be 0-dimensional tensors, which only an optimizer's own step reads.
    """

    sign: float = 1.0
    l2: float = 0.0
    shrink: float = 1.0
    decay: float = 0.0
    keep: float = 1.0
    direct: float = 0.0
    follow: float = 0.0
    square_decay: float = 0.0
    square_keep: float = 0.0
    scale: float = 0.0
    eps: float = 0.0
    variance: float | Tensor = 0.0
    floor_sq: float | Tensor = -1.0


class StepState(NamedTuple):
    """What the fused pass updates beside a parameter, and how."""

    momentum: Tensor | None
    square: Tensor | None
    rule: StepRule
