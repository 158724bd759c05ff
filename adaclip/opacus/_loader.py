"""Loaders that count as Opacus does, and what they were made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch.utils.data import DataLoader

from adaclip.batches import LoaderBase
from adaclip.epochs import EpochLoader
from adaclip.sampler import PoissonLoader

__all__ = ["make_loader", "original_of"]

# Opacus takes a private loader once more, for another run; here the ordinary one below it is taken.
_ORIGINALS: WeakKeyDictionary[LoaderBase, DataLoader] = WeakKeyDictionary()


def original_of(data_loader: DataLoader | LoaderBase) -> DataLoader:
    """The ordinary loader that a private one was made from; any other as it is."""
    if isinstance(data_loader, LoaderBase):
        return _ORIGINALS.get(data_loader, data_loader)
    return data_loader


def make_loader(
    make: Callable[..., PoissonLoader | EpochLoader],
    data_loader: DataLoader,
    poisson_sampling: bool,
    *processes: Any,
    averaged: bool,
    **options: Any,
) -> PoissonLoader | EpochLoader:
    """What `make` makes of a loader, with Opacus's sampling rate and denominator.

    The rate is 1/len(data_loader), which differs from batch_size/N where the batch size does not divide N. The
    denominator is int(N/len(data_loader)) or, for a summed loss (not `averaged`), 1. Both are public.
    """
    # What is no such loader is refused below, by its own message.
    if poisson_sampling and isinstance(data_loader, DataLoader) and _has_batches(data_loader):
        if len(data_loader) == 0:
            raise ValueError(
                "data_loader must give at least 1 batch: its inverse length is the sampling rate"
            )
        options["sample_rate"] = 1 / len(data_loader)
    loader = make(data_loader, poisson_sampling, *processes, **options)
    # Opacus's own expression, rounding included. It is 0 for some N of batches of one, and divides by it.
    per_step = int(loader.dataset_size * (1 / len(data_loader)))
    loader.expected_batch_size = float(max(1, per_step)) if averaged else 1.0
    _ORIGINALS[loader] = data_loader
    return loader


def _has_batches(data_loader: DataLoader) -> bool:
    dataset = data_loader.dataset
    return data_loader.batch_sampler is not None and hasattr(dataset, "__len__") and len(dataset) > 0
