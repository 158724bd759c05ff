"""`opacus.accountants.utils`."""

from adaclip.opacus.accountants import get_noise_multiplier

__all__ = ["get_noise_multiplier"]
