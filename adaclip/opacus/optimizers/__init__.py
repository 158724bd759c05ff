"""`opacus.optimizers`."""

from typing import Any

from adaclip.opacus._replacements import raise_import_error
from adaclip.opacus.optimizers.optimizer import DPOptimizer

__all__ = ["DPOptimizer"]


def __getattr__(name: str) -> Any:
    raise_import_error(__name__, name)
