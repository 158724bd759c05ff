"""`opacus.data_loader`: names that say what replaces them."""

from typing import Any

from adaclip.opacus._replacements import raise_import_error


def __getattr__(name: str) -> Any:
    raise_import_error(__name__, name)
