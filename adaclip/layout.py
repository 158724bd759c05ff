"""How tensors lie in memory."""

from __future__ import annotations

import torch

__all__ = ["is_flat"]


def is_flat(tensor: torch.Tensor) -> bool:
    """True if the elements fill one block of memory, in whatever order of dimensions."""
    if tensor.layout != torch.strided:
        return False
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
