"""The Poisson loader: batches sampled exactly as subsampled-Gaussian accounting assumes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    default_collate,
)

from adaclip.augment import Augmentation, Views
from adaclip.batches import (
    BatchInfo,
    Finisher,
    LoaderBase,
    check_count,
    check_data_loader,
    check_functions,
    check_split,
    pin_rows,
    zero_rows,
)
from adaclip.columns import TensorColumns
from adaclip.noise import STREAM_SAMPLER, STREAM_VIEWS, NoiseSource
from adaclip.planned import Part, PlannedBatches

_log = logging.getLogger("adaclip")

# Views of processes other than the first are drawn from streams of their own, above every named stream of
# adaclip.noise and below the user's.
_RANK_STREAMS = 1 << 15


class PoissonLoader(LoaderBase):
    """An iterable of Poisson-sampled batches of a map-style data set, for subsampled-Gaussian accounting.

    Guarantee: at every logical step each of the N examples is in the logical batch independently of all
    others, of all other steps and of the data with probability `sample_rate`, by a ChaCha20 keystream whose
    256-bit key comes from the operating system (`adaclip.noise.NoiseSource`). The keystream position is the
    number of logical steps delivered since the loader was created, so no random bit decides two delivered
    steps: not in later epochs, not after a ``break``, not after `load_state_dict`. Which examples step t
    holds depends on the key and t only, never on workers, prefetching, splitting or the number of processes. With
    ``world_size = w`` and one key for all, process r takes every w-th example of the one sample, from the r-th on:
    the union over the processes is the Poisson sample that one process would have drawn. All of them get as many
    physical batches, the last of which may be empty.

    The guarantee is per index of `dataset`; an example stored twice is two examples. `collate_fn` and
    `transform` must work row by row (row b of the result depends on example b alone): a batch-wide
    operation such as mixup or a mean over the batch breaks the per-example sensitivity.

    Logical and physical batches: a logical batch gets one noisy update. It has a random size, binomial with
    mean ``sample_rate * N``. With `max_batch_size` it arrives as several physical batches of at most that
    many rows; without, as one. `current` describes the physical batch that was yielded last. Leaving the
    loop inside a logical batch abandons it: the next ``iter()`` starts the following logical step, and
    whoever sums gradients sees ``current.first`` while a sum is unfinished, and drops it.

    Empty logical batches: they happen (with probability ``(1-q)^N``), and the step counts and gets noise
    like any other. Such a batch is yielded as one row of zeros of the data's shapes and dtypes
    (``current.rows == 0, current.padded_rows == 1``), whose weight is zero, so that the model, a mean loss
    and metrics never meet a batch without rows, or its nan. (The example whose shapes are copied is
    fetched and then zeroed.)

    Padding: with `pad_to` every physical batch has the same number of rows: the real ones first, then rows
    of zeros (labels 0) with zero weight. Metrics over such a batch should read ``[:current.rows]``.

    Realised batch sizes and `current` are private: publishing them is not covered by the guarantee.

    Args:
        dataset: a map-style data set (``__len__``, ``__getitem__``), or tensors: one tensor [N, …], a
            `TensorDataset`, or a tuple or list of tensors [N, …] (the columns, not the examples). Tensors are
            gathered in memory without workers or collation, on the device on which they live, and batches
            come in the given container (a `TensorDataset` gives lists, as torch does).
        sample_rate: q, the probability of each example in each logical step, in (0, 1].
        steps_per_epoch: logical steps of one iteration; ``max(1, round(1/q))`` if None.
        max_batch_size: most rows of a physical batch, views counted.
        pad_to: None, a number of rows (at least `max_batch_size`, which it sets where that is None), or
            "auto": `max_batch_size`, or where that is None a public size that holds all but about 3 in
            100,000 logical batches (four standard deviations above the mean); the rest are split. A number of
            examples: with `views` the batch has that many times more rows.
        views, augmentation: rows that each example becomes, in the main process after everything else, and what
            is done to its images in each (`adaclip.augment.Views`). Labels and whatever else a batch holds are
            repeated. One view without augmentation leaves batches alone.
        source: the keystream; a fresh secret key if None. Two loaders must not share one source, unless as the
            processes of one run, which must: they draw the same sample, and take different parts of it.
        rank, world_size: this process among those that sample the data set together.
        collate_fn, num_workers, pin_memory, worker_init_fn, persistent_workers, prefetch_factor,
            multiprocessing_context, timeout, generator: as in torch's DataLoader (`generator` seeds workers;
            it never decides which examples are drawn).
        transform: applied to each physical batch as a whole, before padding, in the worker where there are
            any: for example ``lambda b: (b[0].float() / 255, b[1])``.

    Attributes:
        sample_rate, steps_per_epoch, dataset_size (N), dataset, pad_to, views, rank, world_size: as above,
            resolved.
        max_batch_size: most examples of a physical batch.
        expected_batch_size: q·N over all processes, the public number to divide by.
        current: `BatchInfo` or None.
        labels, labels_of, on_batch: for the engine (`LoaderBase`).

    Raises:
        TypeError, ValueError: for arguments as described; while iterating, for a batch that needs padding
            and holds something else than tensors, or that has more rows than examples.
        RuntimeError: when an older iterator of the loader is advanced after a newer one was made, or when
            the data set has changed its size.

    Source: Abadi et al. 2016 (arXiv 1607.00133); Mironov et al. 2019 (arXiv 1908.10530) for the sampling
    that the accounting assumes.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        sample_rate: float,
        steps_per_epoch: int | None = None,
        max_batch_size: int | None = None,
        pad_to: int | str | None = None,
        views: int = 1,
        augmentation: Augmentation | None = None,
        source: NoiseSource | None = None,
        rank: int = 0,
        world_size: int = 1,
        collate_fn: Callable[[list], Any] | None = None,
        num_workers: int = 0,
        transform: Callable[[Any], Any] | None = None,
        pin_memory: bool = False,
        worker_init_fn: Callable[[int], None] | None = None,
        persistent_workers: bool = False,
        prefetch_factor: int | None = None,
        multiprocessing_context: Any = None,
        timeout: float = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        is_map_style = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if isinstance(dataset, IterableDataset) or not is_map_style:
            raise TypeError(
                "dataset must be map-style (__len__ and __getitem__) or tensors, "
                f"got {type(dataset).__name__}"
            )
        if isinstance(sample_rate, bool) or not isinstance(sample_rate, Real):
            raise TypeError(f"sample_rate must be a float, got {sample_rate!r}")
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate}")
        if steps_per_epoch is not None:
            check_count("steps_per_epoch", steps_per_epoch)
        max_batch_size = check_split(max_batch_size, pad_to, views)
        check_functions(collate_fn=collate_fn, transform=transform, worker_init_fn=worker_init_fn)
        check_count("num_workers", num_workers, minimum=0)
        if num_workers == 0 and (persistent_workers or prefetch_factor is not None):
            raise ValueError("persistent_workers and prefetch_factor need num_workers > 0, got 0")
        check_count("world_size", world_size)
        check_count("rank", rank, minimum=0)
        if rank >= world_size:
            raise ValueError(f"rank must be less than world_size = {world_size}, got {rank}")
        if source is not None and not isinstance(source, NoiseSource):
            raise TypeError(
                f"source must be an adaclip.noise.NoiseSource or None, got {type(source).__name__}"
            )

        if world_size > _RANK_STREAMS:
            raise ValueError(f"world_size must be at most {_RANK_STREAMS}, got {world_size}")
        if source is None and world_size > 1:
            raise ValueError(
                f"source must be given where world_size is {world_size}: all processes draw from one key"
            )

        source = NoiseSource() if source is None else source
        stream = _RANK_STREAMS + rank if rank else STREAM_VIEWS
        super().__init__(Views(views, augmentation, source, stream))
        columns = TensorColumns.of(dataset)
        if collate_fn not in (None, default_collate) or num_workers > 0:
            if columns is not None and isinstance(dataset, (tuple, list)):
                raise ValueError(
                    "dataset given as columns must come without collate_fn and with num_workers = 0 "
                    f"(wrap it in a TensorDataset to use them), got num_workers = {num_workers}"
                )
            columns = None
        self.dataset_size = len(dataset if columns is None else columns)
        if self.dataset_size == 0:
            raise ValueError("dataset must hold at least 1 example, got 0")

        self.dataset = dataset
        self.sample_rate = float(sample_rate)
        self.steps_per_epoch = max(1, round(1 / sample_rate)) if steps_per_epoch is None else steps_per_epoch
        self.rank, self.world_size = rank, world_size
        # (B/N)·N may miss B by one unit in the last place, and int() would then give B-1.
        expected = self.sample_rate * self.dataset_size
        near = float(round(expected))
        self.expected_batch_size = near if abs(expected - near) <= 1e-12 * expected else expected
        if pad_to == "auto":
            pad_to = max_batch_size or self._usual_size()
        self.max_batch_size = max_batch_size or pad_to
        self.pad_to = pad_to
        self._source = source
        self._columns = columns
        self._finisher = Finisher(collate_fn or default_collate, transform, pad_to)
        # As torch's DataLoader does, asking for pinned memory means nothing where there is no accelerator.
        self._pin = pin_memory and torch.cuda.is_available()
        self._batches = PlannedBatches()
        self._loader = None
        if columns is None:
            self._loader = DataLoader(
                dataset,
                batch_sampler=self._batches,
                collate_fn=self._finisher,
                num_workers=num_workers,
                pin_memory=pin_memory,
                worker_init_fn=worker_init_fn,
                persistent_workers=persistent_workers,
                prefetch_factor=prefetch_factor,
                multiprocessing_context=multiprocessing_context,
                timeout=timeout,
                generator=generator,
            )

    @classmethod
    def from_data_loader(
        cls,
        data_loader: DataLoader,
        *,
        sample_rate: float | None = None,
        max_batch_size: int | None = None,
        pad_to: int | str | None = None,
        views: int = 1,
        augmentation: Augmentation | None = None,
        source: NoiseSource | None = None,
        rank: int = 0,
        world_size: int = 1,
        transform: Callable[[Any], Any] | None = None,
    ) -> PoissonLoader:
        """Return a Poisson loader with the data set, rate, collation and workers of `data_loader`.

        ``sample_rate = batch_size / len(dataset)`` unless it is given; `shuffle` and `drop_last` no longer mean anything. A
        `DistributedSampler` gives rank and world size, and then `batch_size` counts per process
        (``sample_rate = batch_size * world_size / len(dataset)``).

        Raises:
            TypeError: `data_loader` is not a torch DataLoader.
            ValueError: it samples in a way that Poisson sampling would silently replace (custom batch
                sampler, weighted or subset sampler), its data set is iterable-style or empty, it has no batch
                size or one above the size of the data set, or rank and world_size contradict its sampler.
        """
        check_data_loader(
            data_loader,
            (RandomSampler, SequentialSampler, DistributedSampler),
            "its batches are replaced by Poisson samples of the whole data set",
        )
        size, batch = len(data_loader.dataset), data_loader.batch_size
        sampler = data_loader.sampler
        if isinstance(sampler, DistributedSampler):
            theirs = (sampler.rank, sampler.num_replicas)
            if (rank, world_size) not in ((0, 1), theirs):
                raise ValueError(
                    "rank and world_size must agree with data_loader's DistributedSampler "
                    f"{theirs}, got {(rank, world_size)}"
                )
            rank, world_size = theirs
            batch *= world_size
            _log.info("rank %d of %d taken from the DistributedSampler", rank, world_size)
        if sample_rate is None and batch > size:
            raise ValueError(
                f"data_loader.batch_size must be at most the size of the data set, got {batch} > {size}"
            )
        dataset = data_loader.dataset
        if isinstance(dataset, (tuple, list)):
            # To torch a sequence of tensors is a sequence of examples, not of columns.
            dataset = Subset(dataset, range(size))
        return cls(
            dataset,
            sample_rate=batch / size if sample_rate is None else sample_rate,
            max_batch_size=max_batch_size,
            pad_to=pad_to,
            views=views,
            augmentation=augmentation,
            source=source,
            rank=rank,
            world_size=world_size,
            transform=transform,
            collate_fn=data_loader.collate_fn,
            num_workers=data_loader.num_workers,
            pin_memory=data_loader.pin_memory,
            worker_init_fn=data_loader.worker_init_fn,
            persistent_workers=data_loader.persistent_workers,
            prefetch_factor=data_loader.prefetch_factor,
            multiprocessing_context=data_loader.multiprocessing_context,
            timeout=data_loader.timeout,
            generator=data_loader.generator,
        )

    def __len__(self) -> int:
        """Return the number of logical steps of one iteration (physical batches may be more)."""
        return self.steps_per_epoch

    def __repr__(self) -> str:
        return (
            f"PoissonLoader(dataset_size={self.dataset_size}, sample_rate={self.sample_rate:.6g}, "
            f"steps_per_epoch={self.steps_per_epoch}, max_batch_size={self.max_batch_size}, "
            f"pad_to={self.pad_to}, views={self.views}, rank={self.rank}, world_size={self.world_size})"
        )

    def __iter__(self) -> Iterator[Any]:
        """Start an epoch: `steps_per_epoch` logical steps after the last one delivered."""
        size = len(self.dataset if self._columns is None else self._columns)
        if size != self.dataset_size:
            raise RuntimeError(f"dataset must keep its size of {self.dataset_size} examples, got {size}")
        ticket = self._begin()
        plan = self._plan(self._step)
        return self._run(ticket, self._gather(plan) if self._loader is None else self._load(plan))

    def _usual_size(self) -> int:
        """Return the public size that this process's part of nearly all logical batches fits in."""
        mean = self.sample_rate * self.dataset_size
        size = math.ceil((mean + 4 * math.sqrt(mean * (1 - self.sample_rate))) / self.world_size)
        return min(math.ceil(self.dataset_size / self.world_size), 8 * math.ceil(size / 8))

    def _plan(self, start: int) -> Iterator[Part]:
        for step in range(start, start + self.steps_per_epoch):
            drawn = self._source.bernoulli(self.dataset_size, self.sample_rate, step, STREAM_SAMPLER)
            indices = drawn[self.rank :: self.world_size]
            # The first process has the most; all take as many parts, for what they do together in each.
            most = math.ceil(len(drawn) / self.world_size)
            size = self.max_batch_size or max(1, most)
            count = max(1, math.ceil(most / size))
            for i in range(count):
                yield Part(indices[i * size : (i + 1) * size], step, i == 0, i == count - 1)

    def _gather(self, plan: Iterator[Part]) -> Iterator[tuple[Part, Any, int]]:
        for part in plan:
            rows = part.indices if len(part.indices) else np.array([0])
            batch, real = self._finisher.finish(self._columns.select(torch.from_numpy(rows)), len(rows))
            yield part, (pin_rows(batch) if self._pin and not self._views.active else batch), real

    def _load(self, plan: Iterator[Part]) -> Iterator[tuple[Part, Any, int]]:
        sent = self._batches.start(plan)
        fetched = iter(self._loader)  # starts the workers
        return ((sent.popleft(), batch, real) for batch, real in fetched)

    def _run(self, ticket: int, batches: Iterator[tuple[Part, Any, int]]) -> Iterator[Any]:
        epoch, start = self._epoch, self._step
        while True:
            self._check_running(ticket)
            try:
                part, batch, real = next(batches)
            except StopIteration:
                self._announce(None)
                return
            if len(part.indices) == 0:
                batch, real = zero_rows(batch), 0
            padded = max(real, self.pad_to or 1)
            at_start = part.step == start
            info = BatchInfo(
                real, padded, part.first, part.last, part.step, epoch, at_start, self._views.count
            )
            made = self._deliver(batch, info)
            yield pin_rows(made) if self._pin and self._views.active else made

    def state_dict(self) -> dict[str, Any]:
        """Return the keystream position and what it belongs to; never the key."""
        size, rate = self.dataset_size, self.sample_rate
        return {"step": self._step, "epoch": self._epoch, "sample_rate": rate, "dataset_size": size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the steps of `state`; the position never moves back, so that nothing is reused.

        An unfinished logical batch is abandoned, and the next iteration is a whole epoch.

        Raises:
            ValueError: `state` belongs to another sample rate or data-set size.
        """
        for name in ("sample_rate", "dataset_size"):
            ours = getattr(self, name)
            if state[name] != ours:
                raise ValueError(f"{name} must be that of the saved loader, {state[name]}, got {ours}")
        self._load_counters(state)
