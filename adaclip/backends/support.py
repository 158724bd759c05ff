"""What each backend can run: reasons are found without importing its kernels."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adaclip import _core
from adaclip.backends.current import current
from adaclip.backends.values import Like
from adaclip.reference import wide_dtype

__all__ = [
    "CUDA_KERNELS",
    "DOUBLES",
    "OPERATIONS",
    "REASONS",
    "cuda_missing",
    "interpreting",
    "triton_missing",
]

# Gradients and activations: also 16-bit ones, as they are or widened, which is exact.
GRADIENTS = "gradients"
# Tensors that are updated in place, or noise itself.
SINGLES = "float32"
# Norms and what is made of them.
DOUBLES = "float64"

OPERATIONS = {
    "conv_sample_norms": GRADIENTS,
    "conv_weighted_grad": GRADIENTS,
    "linear_sample_norms": GRADIENTS,
    "linear_weighted_grad": GRADIENTS,
    "group_norm_backward": GRADIENTS,
    "row_sqnorms": GRADIENTS,
    "weighted_sum": GRADIENTS,
    "clip_factors": DOUBLES,
    "sample_statistics": DOUBLES,
    "follow_quantile": DOUBLES,
    "normal_fill": SINGLES,
    "noisy_step": SINGLES,
    "noisy_sum": SINGLES,
    "perturb": SINGLES,
}
"""What there is to run, and the dtypes of its tensors."""

CUDA_KERNELS = ("conv_sample_norms", "noisy_step")
"""Operations that are written in CUDA C++, too."""

# On a GPU these are cuDNN's and cuBLAS's (adaclip.backends.cudnn_grads).
_LIBRARIES = ("conv_weighted_grad", "linear_weighted_grad")

_ON_GPU = (torch.float32, torch.float16, torch.bfloat16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cpp(operation: str, tensors: Sequence[Tensor | Like], planar: bool) -> str | None:
    kind = OPERATIONS[operation]
    dtype = torch.float64 if kind == DOUBLES else torch.float32
    # What a normalization's backward is given is not widened: torch has kernels for mixed dtypes.
    widens = kind == GRADIENTS and operation != "group_norm_backward"
    for t in tensors:
        if t.device.type != "cpu" or (wide_dtype(t.dtype) if widens else t.dtype) != dtype:
            return f"it runs {_name(dtype)} tensors on the CPU, got {t.dtype} on {t.device.type}"
    return None


def _triton(operation: str, tensors: Sequence[Tensor | Like], planar: bool) -> str | None:
    missing = None if operation in _LIBRARIES else triton_missing()
    if missing is not None:
        return missing
    kind = OPERATIONS[operation]
    dtypes = {GRADIENTS: _ON_GPU, SINGLES: (torch.float32,), DOUBLES: (torch.float64,)}[kind]
    for t in tensors:
        if t.device.type != "cuda" and not (t.device.type == "cpu" and interpreting()):
            return (
                "it runs tensors on a CUDA GPU (or on the CPU with TRITON_INTERPRET=1 in the environment, slowly), "
                f"got {t.device.type}"
            )
        if t.dtype not in dtypes:
            return f"it runs {', '.join(map(_name, dtypes))}, got {t.dtype}"
        if t.device.type == "cuda" and (older := _older(t.device)) is not None:
            return older
    if operation == "conv_sample_norms" and not planar:
        return "it has no kernel for three-dimensional convolutions"
    return None


def _cuda(operation: str, tensors: Sequence[Tensor | Like], planar: bool) -> str | None:
    if operation not in CUDA_KERNELS:
        return _triton(operation, tensors, planar)
    # Convolutions of shapes that the CUDA kernel is not for are Triton's.
    missing = cuda_missing() or (triton_missing() if operation == "conv_sample_norms" else None)
    if missing is not None:
        return missing
    for t in tensors:
        if t.device.type != "cuda":
            return f"it runs tensors on a CUDA GPU, got {t.device.type}"
        if t.dtype not in (_ON_GPU if OPERATIONS[operation] == GRADIENTS else (torch.float32,)):
            return f"it has no kernel for {t.dtype}"
        why = _older(t.device) or _runtime_refuses(t.device)
        if why is not None:
            return why
    if operation == "conv_sample_norms" and not planar:
        return "it has no kernel for three-dimensional convolutions"
    return None


REASONS: dict[str, Callable[[str, Sequence[Tensor | Like], bool], str | None]] = {
    "cpp": _cpp,
    "triton": _triton,
    "cuda": _cuda,
}
"""Why a backend cannot run an operation on tensors, or None. The reference runs everything."""


@functools.cache
def _older(device: torch.device) -> str | None:
    """Why kernels that count on tensor cores of NVIDIA's A100 and later, and on how those round, cannot run there."""
    if not torch.cuda.is_available():
        return None
    if torch.version.hip is not None:
        return "its kernels are for GPUs of NVIDIA"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernels need compute capability 8.0 (A100) or newer"
    return None


@functools.cache
def _runtime_refuses(device: torch.device) -> str | None:
    """Why the CUDA kernels, whose runtime and machine code are not torch's, cannot run there."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    index = torch.cuda.current_device() if device.index is None else device.index
    with current(torch.device("cuda", index)):
        return _core.cuda.device_refusal(index) or None


@functools.cache
def triton_missing() -> str | None:
    """Why there are no Triton kernels here; None if there are."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'adaclip[gpu]')"
    return None


def cuda_missing() -> str | None:
    """Why there are no CUDA C++ kernels here; None if they are built."""
    if _core.CUDA_BUILT:
        return None
    return f"adaclip was built without its CUDA kernels: {_core.CUDA_NOTE}"


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter, on the CPU: said by the environment before they are imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
