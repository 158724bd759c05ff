"""`opacus.schedulers.noise_scheduler`: a noise multiplier that changes with the epoch, and is booked as it is.

A run with a target epsilon has its noise planned: give make_private_with_epsilon a noise_schedule
(`adaclip.schedules`) instead, which is calibrated as a whole.
"""

from __future__ import annotations

from collections.abc import Callable

from adaclip.opacus.optimizers.optimizer import DPOptimizer
from adaclip.opacus.schedulers._scheduler import Exponential, Lambda, Step

__all__ = ["ExponentialNoise", "LambdaNoise", "StepNoise"]


class ExponentialNoise(Exponential):
    attribute = "noise_multiplier"


class StepNoise(Step):
    attribute = "noise_multiplier"


class LambdaNoise(Lambda):
    attribute = "noise_multiplier"

    def __init__(self, optimizer: DPOptimizer, *, noise_lambda: Callable[[int], float], last_epoch: int = -1):
        super().__init__(optimizer, noise_lambda, last_epoch)
