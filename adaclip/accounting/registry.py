"""Accountants by name."""

from __future__ import annotations

from adaclip.accounting.accountant import Accountant
from adaclip.accounting.pld_accountant import PLDAccountant
from adaclip.accounting.rdp_accountant import RDPAccountant

#: What the engine, the calibration and the command line use unless told otherwise.
DEFAULT_ACCOUNTANT = "pld"

_ACCOUNTANTS: dict[str, type[Accountant]] = {kind.name: kind for kind in (PLDAccountant, RDPAccountant)}
# Names that other libraries have for accountants.
_ELSEWHERE = {
    "prv": ": Opacus's 'prv' corresponds to 'pld'",
    "gdp": ": gdp_epsilon gives the figure of Gaussian DP, which is no guarantee",
}


def create_accountant(name: str, adjacency: str = "add_remove") -> Accountant:
    """A new accountant: ``"pld"`` (the tightest) or ``"rdp"`` (also a privacy filter).

    Raises:
        ValueError: no accountant has that name, or the adjacency is unknown; the message lists those that exist.
    """
    if not isinstance(name, str) or name not in _ACCOUNTANTS:
        names = ", ".join(repr(known) for known in sorted(_ACCOUNTANTS))
        raise ValueError(f"accountant must be one of {names}, got {name!r}" + _ELSEWHERE.get(str(name), ""))
    return _ACCOUNTANTS[name](adjacency)
