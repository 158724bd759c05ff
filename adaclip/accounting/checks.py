"""Argument checks of the accounting package: each returns the plain Python number, or raises."""

from __future__ import annotations

import operator
import sys
from decimal import Decimal
from numbers import Real

import numpy as np

MAX_COUNT = 2**53  # beyond it a count is no longer exact as a float


def real(name: str, value: object, rule: str) -> float:
    """``value`` as a float; strings, None, truth values, arrays and other things that are no single number are a
    TypeError."""
    number = value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a scalar of numpy or torch
        try:
            number = value.item()
        except RuntimeError:  # a tensor without data
            number = None
    if isinstance(number, bool) or not isinstance(number, Real | Decimal):
        raise TypeError(f"{name} must be {rule}, got {value!r}")
    try:
        return float(number)
    except OverflowError:
        raise ValueError(f"{name} must be {rule}, got an integer beyond the range of floats") from None


def integer(name: str, value: object, minimum: int) -> int:
    """``value`` as an int in [minimum, 2**53]; floats are a TypeError even when whole, and so are truth values."""
    rule = f"an integer in [{minimum}, 2**53]"
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be {rule}, got {value!r}")
    if not minimum <= number <= MAX_COUNT:
        raise ValueError(f"{name} must be {rule}, got {short(number)}")
    return number


def short(number: int) -> str:
    """An integer in digits, or where those are too many, about how large it is."""
    return str(number) if abs(number) < 10**40 else f"an integer of {number.bit_length()} bits"


def probability(name: str, value: object) -> float:
    """``value`` in [0, 1]."""
    number = real(name, value, "a number in [0, 1]")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {number!r}")
    return number


def positive_probability(name: str, value: object) -> float:
    """``value`` in (0, 1]."""
    number = real(name, value, "a number in (0, 1]")
    if not 0.0 < number <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {number!r}")
    return number


def delta_value(name: str, value: object) -> float:
    """``value`` strictly between 0 and 1, and large enough for a float to hold all of its digits."""
    number = real(name, value, "a number in (0, 1)")
    if not 0.0 < number < 1.0:
        raise ValueError(f"{name} must be in (0, 1), got {number!r}")
    if number < sys.float_info.min:
        raise ValueError(f"{name} must be at least {sys.float_info.min:.3g}, got {number!r}")
    return number


def noise(name: str, value: object) -> float:
    """``value`` ≥ 0, inf allowed."""
    number = real(name, value, "a number ≥ 0")
    if not number >= 0.0:
        raise ValueError(f"{name} must be ≥ 0, got {number!r}")
    return number


def positive_finite(name: str, value: object) -> float:
    """``value`` > 0 and finite."""
    number = real(name, value, "a finite number > 0")
    if not 0.0 < number < float("inf"):
        raise ValueError(f"{name} must be > 0 and finite, got {number!r}")
    return number


def nonnegative_finite(name: str, value: object) -> float:
    """``value`` ≥ 0 and finite."""
    number = real(name, value, "a finite number ≥ 0")
    if not 0.0 <= number < float("inf"):
        raise ValueError(f"{name} must be ≥ 0 and finite, got {number!r}")
    return number


def one_of(name: str, value: object, choices: tuple[str, ...]) -> str:
    """``value``, one of the strings ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def array(name: str, value: object, rule: str) -> np.ndarray:
    """``value`` as a float64 array of any shape."""
    try:
        if np.asarray(value).dtype.kind in "biuf":
            return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):  # ragged lists, tensors without data
        pass
    raise TypeError(f"{name} must be {rule}, got {value!r}")
