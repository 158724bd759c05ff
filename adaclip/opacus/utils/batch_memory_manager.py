"""`opacus.utils.batch_memory_manager`: logical batches in physical pieces, for a while."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from adaclip.batches import LoaderBase, check_split
from adaclip.epochs import EpochLoader
from adaclip.opacus._replacements import raise_import_error
from adaclip.optimizer import DPOptimizer

__all__ = ["BatchMemoryManager"]


class BatchMemoryManager:
    """Within `with`, the private loader's batches come in physical ones of at most so many rows.

    The same as `make_private(max_batch_size=…)`, which lasts. `step()` and `zero_grad()` act on the last piece of
    a logical batch only.

    Args:
        data_loader: the loader that make_private returned.
        max_physical_batch_size: at least 1.
        optimizer: the optimizer that make_private returned with it.

    Raises:
        TypeError, ValueError: an argument is none of these.
    """

    def __init__(self, *, data_loader: LoaderBase, max_physical_batch_size: int, optimizer: DPOptimizer):
        if not isinstance(data_loader, LoaderBase):
            raise TypeError(
                f"data_loader must be the one that make_private returned, got {type(data_loader).__name__}"
            )
        if not isinstance(optimizer, DPOptimizer):
            raise TypeError(
                f"optimizer must be the one that make_private returned, got {type(optimizer).__name__}"
            )
        self._size = check_split(max_physical_batch_size, data_loader.pad_to, data_loader.views)
        if self._size is None:
            raise TypeError("max_physical_batch_size must be an int, got None")
        self._loader = data_loader
        self._before: int | None = None

    def __enter__(self) -> _Pieces:
        self._before, self._loader.max_batch_size = self._loader.max_batch_size, self._size
        return _Pieces(self._loader)

    def __exit__(self, *error: object) -> None:
        self._loader.max_batch_size = self._before


class _Pieces:
    """The private loader, with a length that counts physical batches: the expected number of them."""

    def __init__(self, loader: LoaderBase):
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def __len__(self) -> int:
        loader = self._loader
        # Shuffled batches have the sampling rate 1, but an epoch of them is one pass, too.
        passes = 1.0 if isinstance(loader, EpochLoader) else loader.sample_rate * len(loader)
        examples = loader.dataset_size * passes
        return max(len(loader), math.ceil(examples / loader.max_batch_size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def __getattr__(name: str) -> Any:
    raise_import_error(__name__, name)
