"""`opacus.schedulers`: the noise multiplier and the clipping norm by epoch."""

from typing import Any

from adaclip.opacus._replacements import raise_import_error
from adaclip.opacus.schedulers.grad_clip_scheduler import ExponentialGradClip, LambdaGradClip, StepGradClip
from adaclip.opacus.schedulers.noise_scheduler import ExponentialNoise, LambdaNoise, StepNoise

__all__ = [
    "ExponentialGradClip",
    "ExponentialNoise",
    "LambdaGradClip",
    "LambdaNoise",
    "StepGradClip",
    "StepNoise",
]


def __getattr__(name: str) -> Any:
    raise_import_error(__name__, name)
