"""What the state of a smoothing must look like: a checkpoint from anywhere may hold anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaclip.ranges import holds

__all__ = ["check_smoothing"]


def check_smoothing(state: Any, parameters: int, ours: Mapping[str, Any] | None) -> None:
    """Raise ValueError unless `state` is a smoothing's of so many parameters; ours: its condition's state, if it has one."""
    if not isinstance(state, Mapping) or state.keys() != {"scales", "signal"}:
        raise ValueError(f"the smoothing's state must hold scales and signal, got {_short(state)}")
    if isinstance(state["scales"], list) and len(state["scales"]) != parameters:
        raise ValueError(f"the smoothing's state is of {len(state['scales'])} parameters, got {parameters}")
    signal = state["signal"]
    if (signal is None) != (ours is None):
        raise ValueError("the smoothing's state is of a run with another smoothing")
    lists = {"scales": state["scales"]}
    if ours is not None:
        if not isinstance(signal, Mapping) or signal.keys() != ours.keys():
            raise ValueError(f"the smoothing's signal must hold {sorted(ours)}, got {_short(signal)}")
        lists["variances"] = signal["variances"]
        if isinstance(signal["steps"], bool) or not isinstance(signal["steps"], int) or signal["steps"] < 0:
            raise ValueError(
                f"the smoothing's steps must be an int of at least 0, got {_short(signal['steps'])}"
            )
        for name in ("average", "best"):
            if signal[name] is not None and not holds(signal[name], lambda v: v == v):
                raise ValueError(
                    f"the smoothing's {name} must be a number or None, got {_short(signal[name])}"
                )
    for name, values in lists.items():
        if not isinstance(values, list) or len(values) != parameters:
            raise ValueError(f"the smoothing's state is of other parameters: its {name} are {_short(values)}")
        for value in values:
            if value is not None and not holds(value, lambda v: v >= 0):
                raise ValueError(
                    f"the smoothing's {name} must be numbers of at least 0 or None, got {_short(value)}"
                )


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
