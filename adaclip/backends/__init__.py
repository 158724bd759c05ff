"""Which implementation of an operation runs, and why another one does not.

    cuda        CUDA C++ for the operations that have it (`CUDA_KERNELS`), the Triton kernels for the others
    triton      Triton kernels on a CUDA GPU; on the CPU in Triton's interpreter (TRITON_INTERPRET=1), when named
    cpp         the C++ core, on the CPU
    reference   plain torch, on any device and in any dtype

Every backend is a module with one function for each operation, of the same name and signature in all of them;
arguments are checked in front of them (`adaclip.ops`, `adaclip.clip_ops`, `adaclip.noise`, `adaclip.update`).
"auto" takes the first of them that can run the tensors given. A backend asked for by name that cannot raises
and says why.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from adaclip.backends import support
from adaclip.backends.support import CUDA_KERNELS, OPERATIONS
from adaclip.backends.values import ConvGeometry, Key, Like, Method, Rounding, SampleNorms

__all__ = [
    "BACKENDS",
    "CUDA_KERNELS",
    "OPERATIONS",
    "ConvGeometry",
    "Key",
    "Like",
    "Method",
    "Rounding",
    "SampleNorms",
    "check_backend",
    "describe",
    "implementation",
    "kernels_on",
    "load",
    "resolve_backend",
    "why_not",
]

BACKENDS = ("cuda", "triton", "cpp", "reference")


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is "auto" or one of `BACKENDS`."""
    if not isinstance(backend, str) or backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")


def why_not(operation: str, backend: str, *tensors: Tensor | Like, planar: bool = True) -> str | None:
    """Why a backend cannot run an operation on these tensors; None if it can.

    planar: whether a convolution is one over images (`ConvGeometry.planar`).
    """
    return support.REASONS[backend](operation, tensors, planar) if backend in support.REASONS else None


def resolve_backend(
    operation: str, backend: str, *tensors: Tensor | Like, planar: bool = True, prefer: str | None = None
) -> str:
    """The backend that runs an operation on these tensors.

    Args:
        operation: one of `OPERATIONS`.
        backend: "auto" or one of `BACKENDS`.
        tensors: what decides: their devices and dtypes. None at all: the CPU.
        planar: as in `why_not`.
        prefer: of those that "auto" takes on a GPU, the one that was measured to be the fastest.

    Raises:
        RuntimeError: the backend named cannot run it.
    """
    if backend != "auto":
        why = why_not(operation, backend, *tensors, planar=planar)
        if why is not None:
            raise RuntimeError(f"backend {backend!r} cannot run {operation}: {why}")
        return backend
    for candidate in _automatic(operation, tensors, prefer):
        if why_not(operation, candidate, *tensors, planar=planar) is None:
            return candidate
    return "reference"


def _automatic(operation: str, tensors: tuple[Tensor | Like, ...], prefer: str | None) -> list[str]:
    """What "auto" tries before the reference. Never the interpreter: it is for tests."""
    if not all(t.device.type == "cuda" for t in tensors) or not tensors:
        return ["cpp"]
    own = ["cuda", "triton"] if operation in CUDA_KERNELS else ["triton"]
    return sorted(own, key=lambda name: name != prefer)


def implementation(
    operation: str, backend: str, *tensors: Tensor | Like, planar: bool = True, prefer: str | None = None
):
    """The function that runs an operation on these tensors; arguments and errors of `resolve_backend`."""
    name = resolve_backend(operation, backend, *tensors, planar=planar, prefer=prefer)
    return getattr(load(name), operation)


@functools.cache
def load(backend: str) -> ModuleType:
    """A backend's module. Those for GPUs are only imported when they are needed."""
    return importlib.import_module(f"adaclip.backends.{backend}")


def kernels_on(device: torch.device | str) -> str:
    """Which backend "auto" takes there for what, in one line; for tensors of the usual dtype and any shape."""
    chosen: dict[str, list[str]] = {}
    for operation, backend in describe(device).items():
        chosen.setdefault(backend, []).append(operation)
    if len(chosen) == 1:
        return f"{next(iter(chosen))} for everything"
    return "; ".join(f"{backend}: {', '.join(operations)}" for backend, operations in chosen.items())


def describe(device: torch.device | str, backend: str = "auto") -> dict[str, str]:
    """{operation: the backend that runs it there on tensors of its usual dtype}, or why none does.

    For people: `adaclip doctor` and `adaclip train` print it.
    """
    device, found = torch.device(device), {}
    for operation, kind in OPERATIONS.items():
        like = Like((), torch.float64 if kind == support.DOUBLES else torch.float32, device)
        try:
            found[operation] = resolve_backend(operation, backend, like)
        except RuntimeError as error:
            found[operation] = str(error)
    return found
