"""Data sets that are tensors already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from adaclip.layout import is_channels_last

__all__ = ["TensorColumns", "to_device"]


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device. A GPU gets it by a copy that the CPU does not wait for."""
    if device.type != "cuda":
        return host.to(device)
    # torch's allocator gives pinned memory out again only when the copies that read it are over.
    return host.pin_memory().to(device, non_blocking=True)


class TensorColumns:
    """Batches gathered straight from tensors [N, …], without a copy of the data or a per-example collate.

    Tensors on a GPU are gathered there. Which examples a batch holds is drawn on the host all the same, from the same
    ChaCha20 keystream as everywhere: so the host knows every batch's size, and never has to ask the GPU for it. The
    indices go over in one asynchronous copy.
    """

    def __init__(self, tensors: tuple[Tensor, ...], pack: Callable, index: Tensor | None = None) -> None:
        for i, tensor in enumerate(tensors):
            if tensor.dim() == 0 or tensor.shape[0] != tensors[0].shape[0]:
                shapes = [tuple(t.shape) for t in tensors]
                raise ValueError(f"dataset tensors must share dimension 0, got shapes {shapes} (tensor {i})")
        self._tensors, self._pack, self._index = tensors, pack, index

    def __len__(self) -> int:
        return len(self._tensors[0] if self._index is None else self._index)

    def select(self, indices: Tensor) -> Any:
        """Return the examples `indices` (int64 [B], on the CPU) in the container that the data came in."""
        rows = indices if self._index is None else self._index[indices]
        there = {device: to_device(rows, device) for device in {t.device for t in self._tensors}}
        return self._pack([_gathered(t, there[t.device]) for t in self._tensors])

    @classmethod
    def of(cls, dataset: Any) -> TensorColumns | None:
        """Return the columns of a tensor, TensorDataset, or tuple or list of tensors, else None.

        A `Subset` of a TensorDataset is gathered through its indices.
        """
        if isinstance(dataset, Tensor):
            return cls((dataset,), lambda columns: columns[0])
        if type(dataset) in (tuple, list) and dataset and all(isinstance(t, Tensor) for t in dataset):
            return cls(tuple(dataset), type(dataset))
        index = None
        while type(dataset) is Subset:
            outer = torch.as_tensor(dataset.indices, dtype=torch.int64, device="cpu")
            if bool((outer < 0).any()):
                return None
            index = outer if index is None else outer[index]
            dataset = dataset.dataset
        # The exact type: a subclass may override what an item is. A list is what torch's collate returns.
        return cls(dataset.tensors, list, index) if type(dataset) is TensorDataset else None


def _gathered(t: Tensor, rows: Tensor) -> Tensor:
    """t[rows]; images in channels_last stay so, which index_select makes contiguous."""
    if is_channels_last(t):
        return t.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return t.index_select(0, rows)
