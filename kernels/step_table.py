"""The tensors that a multi-tensor kernel goes over in one launch, as arrays in device memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TILE_CHUNKS", "StepTable", "to_device"]

TILE_CHUNKS = 16
"""Chunks of 160 elements in a tile, which one program takes: kTileChunks of csrc/cuda/noisy_step.h."""

_CHUNK_NORMALS = 160


@dataclass(frozen=True)
class StepTable:
    """P tensors, cut into tiles. Every launch reads the arrays on the device; their owner writes them in between.

    pointers: int64 [P, 4], addresses of float32 memory; 0: absent. Which is which is the kernel's to say.
    numel: int64 [P], elements of each tensor.
    first_chunk: int64 [P], the chunk of the stream where a tensor's noise begins.
    rules: float32 [P, any], the numbers that the kernel computes with.
    tiles: int32 [tiles, 2], a tensor and the tile's first chunk within it. Each element is in exactly one tile.

    The addresses of one row are used with one index: what is there is one block of memory each, with the same
    strides. Nothing but their owner keeps the tensors behind the addresses alive.
    """

    pointers: Tensor
    numel: Tensor
    first_chunk: Tensor
    rules: Tensor
    tiles: Tensor

    @classmethod
    def make(
        cls,
        pointers: Sequence[Sequence[int]],
        numel: Sequence[int],
        first_chunk: Sequence[int],
        rules: Sequence[Sequence[float]],
        device: torch.device,
    ) -> StepTable:
        """The table on `device`, from Python's numbers, one row for each tensor; rules rows of equal length."""
        sizes = torch.tensor(numel, dtype=torch.int64, device="cpu")
        tile = TILE_CHUNKS * _CHUNK_NORMALS
        counts = (sizes + (tile - 1)) // tile
        owner = torch.repeat_interleave(counts)
        within = torch.arange(len(owner), device="cpu") - (counts.cumsum(0) - counts)[owner]
        tiles = torch.stack([owner, within * TILE_CHUNKS], dim=1).to(torch.int32)
        return cls(
            to_device(torch.tensor(pointers, dtype=torch.int64, device="cpu").reshape(-1, 4), device),
            to_device(sizes, device),
            to_device(torch.tensor(first_chunk, dtype=torch.int64, device="cpu"), device),
            to_device(torch.tensor(rules, dtype=torch.float32, device="cpu"), device),
            to_device(tiles, device),
        )


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor, copied to the device; where that is a GPU, the CPU does not wait for the copy.

    The source may be dropped at once: torch's allocator of pinned memory gives a block out again only when the
    copies that read it are over.
    """
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
