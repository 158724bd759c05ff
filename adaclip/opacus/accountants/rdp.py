"""`opacus.accountants.rdp`."""

from adaclip.opacus.accountants import RDPAccountant

__all__ = ["RDPAccountant"]
