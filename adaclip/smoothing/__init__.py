"""Conditional-smoothing descent: optimizers and evaluation points for noisy gradients. None of it costs privacy.

Every part works with a private engine and as plain torch without one, and each is switched by itself:

    SmoothedLoss      gradients at randomly moved weights, on a condition       make_private(smoothing=...)
    NoiseCorrectedNadam, DPAdamBC    the noise's variance removed               optimizer=...
    DiSK              a Kalman filter with look-ahead                           optimizer=...
    moving_average    the average of the weights                                after every step
    EvaluationPoint   what moves the weights for SmoothedLoss and DiSK

In a step: move to the point, forward and backward, clip, move back, one fused pass for noise and update, average.
"""

from adaclip.smoothing.average import moving_average
from adaclip.smoothing.disk import DiSK
from adaclip.smoothing.loss import SmoothedLoss
from adaclip.smoothing.nadam import DPAdamBC, NoiseCorrectedNadam
from adaclip.smoothing.point import EvaluationPoint

__all__ = ["DPAdamBC", "DiSK", "EvaluationPoint", "NoiseCorrectedNadam", "SmoothedLoss", "moving_average"]
