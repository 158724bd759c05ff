"""The numbers of one parameter's update: core/noisy_step.h's StepRule, made by optimizers, read by the fused pass.

And what else passes over all parameters at once: `FusedStep` and `Move` are what backends get of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["FusedStep", "Move", "NoiseTerms", "StepRule", "StepState"]


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


class NoiseTerms(NamedTuple):
    """How a rule's `variance` and `floor_sq` follow from std, where std is known on a device only:

    average = decay average + (1 - decay) std^2
    variance = average unbias
    floor_sq = max(floor std, least)^2
    """

    decay: float
    unbias: float
    floor: float
    least: float


class StepState(NamedTuple):
    """What the fused pass updates beside a parameter, and how.

    noise: where std was not given and the rule depends on it; `variance` and `floor_sq` are then still to be made.
    """

    momentum: Tensor | None
    square: Tensor | None
    rule: StepRule
    noise: NoiseTerms | None = None


@dataclass
class FusedStep:
    """The noisy update of P parameters, all float32 and on one device.

    tensors: (param, grad, momentum, square) of each, blocks of memory with the same strides; None where absent.
    first_chunks: where each parameter's noise begins in the stream.
    rules: std, then the numbers of StepRule.
    stds, terms, averages: where the noise is known on the device only. Float32 [P] stds, there, which take the place
      of those in `rules`; the terms of each parameter or None; and float64 [P] averages, moved in place.
    cache: what a backend keeps from step to step for these parameters; its owner keeps it as long as they are.
    """

    tensors: Sequence[tuple[Tensor | None, ...]]
    first_chunks: Sequence[int]
    rules: Sequence[tuple[float, ...]]
    stds: Tensor | None = None
    terms: Sequence[NoiseTerms] | None = None
    averages: Tensor | None = None
    cache: dict[str, Any] = field(default_factory=dict)


class Move(NamedTuple):
    """out = param + sign shift + length direction, where shift is std z from chunk `first` of a keystream on.

    param, out, shift and direction are blocks of memory with the same strides; shift and direction may be None.
    """

    param: Tensor
    out: Tensor
    shift: Tensor | None
    direction: Tensor | None
    first: int
    std: float
    length: float
