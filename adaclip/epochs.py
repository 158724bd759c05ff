"""The epoch loader: one pass over the data per epoch, for training without Poisson sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from adaclip.augment import Augmentation, Views
from adaclip.batches import (
    BatchInfo,
    LoaderBase,
    check_data_loader,
    check_split,
    measure_rows,
    pad_rows,
    slice_rows,
)
from adaclip.noise import NoiseSource


class EpochLoader(LoaderBase):
    """One pass over the data per epoch, from an ordinary shuffled DataLoader (no Poisson sampling).

    Guarantee: in an epoch every example is in at most one logical batch, so its whole effect on the epoch's
    noisy sums is one bounded contribution: the epoch is one Gaussian release without amplification
    (``sample_rate = 1``), whatever the order. Book one event (q = 1, σ) per epoch, when a `current` with a
    new ``epoch`` first reaches an update. The neighbouring relation is that one example's contribution is
    replaced by nothing while batch positions stay (zero-out adjacency); Chua et al. 2024 (arXiv 2403.17673)
    tell why shuffling may not be accounted like Poisson sampling.

    The denominator of every step is the public `expected_batch_size`, also for a short last batch. What
    `PoissonLoader` says of row-wise `collate_fn`, of `max_batch_size` and padding holds here as well.

    Args:
        data_loader: a DataLoader of a map-style data set with the default batch sampler and a RandomSampler
            without replacement or a SequentialSampler.
        max_batch_size: most rows of a physical batch, views counted; larger ones are split along dimension 0.
        pad_to: None, a number of examples, or "auto" (`max_batch_size`, or else the loader's batch size).
        views, augmentation: as in `PoissonLoader`.
        source: the key of the random views; a fresh secret one if None.

    Attributes:
        sample_rate: 1.0.
        expected_batch_size: the loader's batch size.
        dataset_size, steps_per_epoch, dataset, max_batch_size, pad_to, views: as in `PoissonLoader`.
        epoch: number of epochs begun.
        current: `BatchInfo` or None.

    Raises:
        TypeError, ValueError: `data_loader` might deliver an example twice in an epoch, or cannot be checked.
    """

    def __init__(
        self,
        data_loader: DataLoader,
        *,
        max_batch_size: int | None = None,
        pad_to: int | str | None = None,
        views: int = 1,
        augmentation: Augmentation | None = None,
        source: NoiseSource | None = None,
    ) -> None:
        check_data_loader(
            data_loader,
            (RandomSampler, SequentialSampler),
            "every example must come at most once per epoch",
        )
        sampler = data_loader.sampler
        size = len(data_loader.dataset)
        if isinstance(sampler, RandomSampler) and (sampler.replacement or sampler.num_samples > size):
            raise ValueError(
                "data_loader.sampler must draw without replacement at most the whole data set, got "
                f"replacement={sampler.replacement} and num_samples={sampler.num_samples} of {size}"
            )
        max_batch_size = check_split(max_batch_size, pad_to, views)
        if len(data_loader) == 0:
            raise ValueError(
                "data_loader must give at least 1 batch per epoch, got 0 "
                f"(drop_last with batch_size {data_loader.batch_size} over {len(sampler)} examples)"
            )
        super().__init__(Views(views, augmentation, NoiseSource() if source is None else source))
        if pad_to == "auto":
            pad_to = max_batch_size or data_loader.batch_size
        self._loader = data_loader
        self.dataset = data_loader.dataset
        self.dataset_size = size
        self.sample_rate = 1.0
        self.expected_batch_size = float(data_loader.batch_size)
        self.steps_per_epoch = len(data_loader)
        self.max_batch_size = max_batch_size or pad_to
        self.pad_to = pad_to

    @property
    def epoch(self) -> int:
        """Number of epochs begun, which is the number of events to account for."""
        return self._epoch

    def __len__(self) -> int:
        """Return the number of logical steps of one epoch (physical batches may be more)."""
        return self.steps_per_epoch

    def __repr__(self) -> str:
        return (
            f"EpochLoader(dataset_size={self.dataset_size}, "
            f"expected_batch_size={self.expected_batch_size:g}, steps_per_epoch={self.steps_per_epoch}, "
            f"max_batch_size={self.max_batch_size}, pad_to={self.pad_to}, views={self.views})"
        )

    def __iter__(self) -> Iterator[Any]:
        """Start an epoch."""
        return self._run(self._begin(), iter(self._loader))

    def _run(self, ticket: int, batches: Iterator[Any]) -> Iterator[Any]:
        epoch, start = self._epoch, self._step
        examples = len(self._loader.sampler)
        for i in range(self.steps_per_epoch):
            self._check_running(ticket)
            batch = next(batches)
            rows = measure_rows(batch, min(self._loader.batch_size, examples - i * self._loader.batch_size))
            size = self.max_batch_size or max(1, rows)
            count = max(1, math.ceil(rows / size))
            for j in range(count):
                self._check_running(ticket)
                real = min(size, rows - j * size)
                part = batch if count == 1 else slice_rows(batch, rows, j * size, j * size + real)
                total = max(real, self.pad_to or 1)
                info = BatchInfo(
                    real, total, j == 0, j == count - 1, start + i, epoch, i == 0, self._views.count
                )
                yield self._deliver(part if total == real else pad_rows(part, real, total), info)
        self._announce(None)

    def state_dict(self) -> dict[str, Any]:
        """Return the counters of steps and epochs."""
        return {"step": self._step, "epoch": self._epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue counting after `state`; the next iteration is a new epoch (and a new event)."""
        self._load_counters(state)
