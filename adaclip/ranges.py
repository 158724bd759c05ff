"""Whether an argument is a number in its range, whatever it is: for checks whose errors name the argument."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

__all__ = ["MAX_FLOAT", "holds"]

MAX_FLOAT = sys.float_info.max
"""An int above it is below infinity, and still no float."""


def holds(value: Any, rule: Callable[[float], bool]) -> bool:
    """Whether `value` is one real number (a 0-dim tensor is one; a truth value or text is not) and keeps the rule."""
    if isinstance(value, (bool, str, bytes, bytearray)):
        return False
    try:
        number = float(value)
    except (
        TypeError,
        ValueError,
        OverflowError,
        RuntimeError,
    ):  # no number, none that fits, several, none at hand
        return False
    return rule(number)
