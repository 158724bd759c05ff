"""What a checkpoint must look like before its values are compared: a file from anywhere may hold anything."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_extra", "check_form"]

_FORM: dict[str, tuple[type, ...]] = {
    "module": (dict,),
    "optimizer": (dict,),
    "accountant": (dict,),
    "kinds": (dict,),
    "parts": (dict,),
    "releases": (int,),
    "loader": (dict,),
    "budget": (dict, type(None)),
    "extra": (dict,),
}
_MOST = 2**63  # steps and releases are addresses of noise


def check_form(state: Mapping[str, Any], parts: tuple[str, ...]) -> None:
    """Raise ValueError unless `state` holds everything that a run continues from, each of its type.

    parts: the names of what has a config and a state.
    """
    for name, kinds in _FORM.items():
        value = state.get(name)
        if name not in state or not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"the checkpoint is damaged: its {name} is {_short(value)}")
    if not isinstance(state.get("run"), str | None):
        raise ValueError(f"the checkpoint is damaged: its run is {_short(state['run'])}")
    if not 0 <= state["releases"] < _MOST:
        raise ValueError(f"the checkpoint is damaged: its releases are {state['releases']}")
    for name, value in state["module"].items():
        # What a module's get_extra_state gives may be anything that a checkpoint can hold.
        if not isinstance(name, str) or not (isinstance(value, Tensor) or name.endswith("_extra_state")):
            raise ValueError(f"the checkpoint is damaged: its module's {_short(name)} is {_short(value)}")
    for name in parts:
        part = state["parts"].get(name)
        whole = isinstance(part, dict) and {"config", "state"} <= part.keys()
        if name not in state["parts"] or not (part is None or whole):
            raise ValueError(f"the checkpoint is damaged: its {name} is {_short(part)}")
    for name in ("step", "epoch"):
        value = state["loader"].get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MOST:
            raise ValueError(f"the checkpoint is damaged: its loader's {name} is {_short(value)}")
    _check_optimizer(state["optimizer"])


def _check_optimizer(state: Mapping[str, Any]) -> None:
    groups = state.get("param_groups")
    held = isinstance(groups, list) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    )
    kept = state.get("state")
    if not held or not isinstance(kept, dict) or not all(isinstance(value, dict) for value in kept.values()):
        raise ValueError("the checkpoint is damaged: its optimizer lacks param_groups or state")


_PLAIN = (
    *(str, bytes, int, float, bool, type(None)),
    *(Tensor, nn.Parameter, torch.Size, torch.dtype, torch.device),
)
# Of other dtypes (uint16, float8) a pickle holds what could ask for memory by a number.
_DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
)


def check_extra(value: Any, where: str = "extra") -> None:
    """Raise TypeError unless a checkpoint with `value` can be loaded again, without executing code."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            check_extra(key, f"a key of {where}")
            check_extra(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            check_extra(item, f"{where}[{i}]")
    elif isinstance(value, Tensor) and (value.dtype not in _DTYPES or value.layout != torch.strided):
        raise TypeError(
            f"{where} must be a dense tensor of a common dtype, got {value.dtype} ({value.layout}): a checkpoint that "
            "holds it could not be loaded again"
        )
    elif type(value) not in _PLAIN:
        raise TypeError(
            f"{where} must be a plain value (numbers, text, lists, tuples, dicts, tensors), got "
            f"{type(value).__name__}: a checkpoint that holds it could not be loaded again"
        )


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
