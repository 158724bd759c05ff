"""Parameters of 16 bits, updated in float32: a master copy of each, of which the parameter is the rounded value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["MASTER", "float32_parameters", "keep_wide_state"]

# The key of a parameter's master copy in `optimizer.state`.
MASTER = "master"
_SHORT = (torch.bfloat16, torch.float16)


@contextmanager
def float32_parameters(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> Iterator[None]:
    """In here the 16-bit ones of `params` are float32, and so are their gradients and what an optimizer keeps of them.

    An update smaller than half the distance to the next 16-bit number, 2^-9 of a bfloat16, would be rounded away if
    it were made on the parameter, and noise with it. It is made on the master copy in ``optimizer.state[p]["master"]``,
    float32, of which the parameter takes the value at the end, rounded to nearest, once. Any optimizer does its
    ordinary float32 arithmetic meanwhile; state that it made in 16 bits when it was constructed is widened, which is
    exact. Parameters of other dtypes are left alone.

    The master copy refines the parameter: an element that somebody has set since (a checkpoint, a clamp) is no longer
    the master's rounded value, and the master takes it over. If an error ends the update, the parameters take what
    the master copies are by then.
    """
    short = [p for p in params if p.dtype in _SHORT]
    rounded = {p: p.data for p in short}
    grads = {p: p.grad for p in short}
    try:
        for p in short:
            state = optimizer.state[p]
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dtype in _SHORT:
                    state[name] = value.float()
            # Not among the state meanwhile: optimizers take an empty one for a parameter's first step.
            p.data = _master_of(state.pop(MASTER, None), p.data)
            if p.grad is not None:
                p.grad = p.grad.float()
        yield
    finally:
        for p in short:
            if p.dtype not in _SHORT:
                optimizer.state[p][MASTER], p.data = p.data, rounded[p]
                with torch.no_grad():
                    p.copy_(optimizer.state[p][MASTER])
            p.grad = grads[p]


def _master_of(master: Tensor | None, short: Tensor) -> Tensor:
    if master is None:
        return short.float()
    return torch.where(master.to(short.dtype) == short, master, short.float())


def keep_wide_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """After ``optimizer.load_state_dict(saved)``: float32 state of 16-bit parameters as it was saved.

    torch casts what it loads to the parameter's dtype.
    """
    numbers = [i for group in saved["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in zip(numbers, params, strict=True):
        if p.dtype not in _SHORT:
            continue
        for name, value in saved["state"].get(i, {}).items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.dtype not in _SHORT:
                optimizer.state[p][name] = value.detach().clone().to(optimizer.state[p][name].device)
