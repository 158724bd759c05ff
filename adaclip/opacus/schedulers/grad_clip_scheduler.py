"""`opacus.schedulers.grad_clip_scheduler`: a clipping norm that changes with the epoch; the noise follows.

For per-layer clipping all norms are scaled alike. (Opacus scales the noise alone.)
"""

from __future__ import annotations

from collections.abc import Callable

from adaclip.opacus.optimizers.optimizer import DPOptimizer
from adaclip.opacus.schedulers._scheduler import Exponential, Lambda, Step

__all__ = ["ExponentialGradClip", "LambdaGradClip", "StepGradClip"]


class ExponentialGradClip(Exponential):
    attribute = "max_grad_norm"


class StepGradClip(Step):
    attribute = "max_grad_norm"


class LambdaGradClip(Lambda):
    attribute = "max_grad_norm"

    def __init__(
        self, optimizer: DPOptimizer, *, scheduler_function: Callable[[int], float], last_epoch: int = -1
    ):
        super().__init__(optimizer, scheduler_function, last_epoch)
