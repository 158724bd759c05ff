"""CUDA C++ for the operations that have it (`adaclip.backends.CUDA_KERNELS`); the others are the Triton backend's.

So are the norms of convolutions over planes that the CUDA kernel is not for (`csrc/cuda/conv_sample_norms.h`: more
than 256 positions, windows of more than 8 x 8), and of those whose gradients are instantiated.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from adaclip import _core
from adaclip.backends import triton
from adaclip.backends.cpp import conv_sizes
from adaclip.backends.current import current, on_its_device
from adaclip.backends.device_table import step_table
from adaclip.backends.triton import *  # noqa: F403 - the operations that have no kernel here
from adaclip.backends.values import ConvGeometry, Key, SampleNorms
from adaclip.step_rule import FusedStep

__all__ = [*triton.__all__, "gram"]


@on_its_device()
def conv_sample_norms(
    x: Tensor, g: Tensor, geometry: ConvGeometry, bias: bool, keep: bool | None
) -> SampleNorms:
    return triton.conv_norms(gram, x, g, geometry, bias, triton.conv_method(x, g, geometry, keep))


def gram(x: Tensor, g: Tensor, **geometry) -> tuple[Tensor, Tensor]:
    """`adaclip.kernels.conv_sample_norms` in CUDA C++, where it takes the shape."""
    batch, *shape = conv_sizes(x.shape, g.shape, ConvGeometry(**geometry))
    if _refused(tuple(shape), x.device):
        from adaclip.kernels.conv_sample_norms import conv_sample_norms

        return conv_sample_norms(x, g, **geometry)
    sqnorms, magnitudes = (x.new_empty(batch, dtype=torch.float64) for _ in range(2))
    if batch:
        _core.cuda.conv_sample_norms(
            *(x.data_ptr(), g.data_ptr(), batch, *shape),
            *(str(x.dtype).removeprefix("torch."), _strides(x), _strides(g)),
            *(sqnorms.data_ptr(), magnitudes.data_ptr()),
            *_place(x.device),
        )
    return sqnorms, magnitudes


@functools.cache
def _refused(shape: tuple, device: torch.device) -> bool:
    return bool(_core.cuda.conv_sample_norms_refusal(1, *shape, _place(device)[0]))


def _strides(t: Tensor) -> tuple[int, int, int]:
    """Of sample, channel and position, for [B, C, H, W] in one of the two layouts."""
    _, channels, height, width = t.shape
    plane = height * width
    return (channels * plane, plane, 1) if t.is_contiguous() else (channels * plane, 1, channels)


def _place(device: torch.device) -> tuple[int, int]:
    """The device's number and torch's current stream there."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def noisy_step(key: Key, step: int | Tensor, stream: int, fused: FusedStep) -> None:
    if not fused.tensors:
        return
    device, table = fused.tensors[0][0].device, step_table(fused)
    counter = triton.counter(step, device)
    arrays = table.pointers, table.numel, table.first_chunk, table.rules, table.tiles
    with current(device):
        _core.cuda.noisy_step(
            *(key.on(device).data_ptr(), counter.data_ptr(), stream),
            *(t.data_ptr() for t in arrays),
            len(table.tiles),
            *_place(device),
        )
