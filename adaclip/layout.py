"""How tensors lie in memory."""

from __future__ import annotations

import torch

__all__ = ["is_channels_last", "is_flat", "laid_as"]


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


def is_channels_last(tensor: torch.Tensor) -> bool:
    """True for images [B, C, H, W] in channels_last, unless they are contiguous as well."""
    if tensor.layout != torch.strided or tensor.dim() != 4 or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last)


def laid_as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor`, in its own dtype, with the strides of `like`, which has its shape: a copy only where the memory is in another order."""
    if tensor.stride() == like.stride():
        return tensor
    sizes = zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    if is_flat(like) and all(size == 1 or mine == other for size, mine, other in sizes):
        # Strides along dimensions of size 1 say nothing.
        return tensor.as_strided(like.shape, like.stride())
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
