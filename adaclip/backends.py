"""Which implementation of an operation runs: the C++ core, or plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BACKENDS", "check_backend", "resolve_backend"]

BACKENDS = ("cpp", "reference")


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is "auto" or one of `BACKENDS`."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")


def resolve_backend(backend: str, *tensors: Tensor, dtype: torch.dtype = torch.float32) -> str:
    """The backend that runs these tensors; raises RuntimeError if the one named cannot.

    dtype: what the operation's kernel in the C++ core is written for.
    """
    if backend == "reference":
        return "reference"
    why = next(
        (
            f"it runs {str(dtype).removeprefix('torch.')} tensors on the CPU, got {t.dtype} on {t.device.type}"
            for t in tensors
            if t.dtype != dtype or t.device.type != "cpu"
        ),
        None,
    )
    if why is None:
        return "cpp"
    if backend == "cpp":
        raise RuntimeError(f"backend 'cpp' cannot run this operation: {why}")
    return "reference"
