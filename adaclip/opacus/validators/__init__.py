"""`opacus.validators`."""

from typing import Any

from adaclip.opacus._replacements import raise_import_error
from adaclip.opacus.validators.module_validator import ModuleValidator

__all__ = ["ModuleValidator"]


def __getattr__(name: str) -> Any:
    raise_import_error(__name__, name)
