"""`opacus.grad_sample`: only `functorch` has something; the model is not wrapped."""

from typing import Any

from adaclip.opacus._replacements import raise_import_error


def __getattr__(name: str) -> Any:
    raise_import_error(__name__, name)
