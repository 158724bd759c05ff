"""`opacus.accountants.prv`."""

from adaclip.opacus.accountants import PRVAccountant

__all__ = ["PRVAccountant"]
