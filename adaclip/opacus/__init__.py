"""Opacus's names over adaclip's engine: `from opacus import PrivacyEngine` becomes `from adaclip.opacus import …`.

The modules have the names of Opacus's. What has a counterpart here has Opacus's arguments and does what they say;
what has none raises an ImportError or AttributeError that says what to do instead. docs/migrating-from-opacus.md is
the whole table. Nothing here imports opacus, and nothing below imports from here.

Not what Opacus does, on purpose: the model comes back unwrapped, noise and sampling are always cryptographic, a
target epsilon is enforced, and batches are accounted for as they were drawn.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from adaclip.opacus._replacements import raise_import_error

if TYPE_CHECKING:
    from adaclip.opacus.privacy_engine import PrivacyEngine

__all__ = ["PrivacyEngine"]


def __getattr__(name: str) -> Any:
    # On first use, so that the accountants need no torch.
    if name == "PrivacyEngine":
        return import_module("adaclip.opacus.privacy_engine").PrivacyEngine
    raise_import_error("adaclip.opacus", name)
