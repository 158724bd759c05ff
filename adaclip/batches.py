"""What the loaders share: the description of a physical batch, and row operations on nested batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SubsetRandomSampler,
    get_worker_info,
)

from adaclip.layout import is_channels_last

if TYPE_CHECKING:
    from adaclip.augment import Views


@dataclass(frozen=True)
class BatchInfo:
    """Describes the physical batch that the user's loop holds (``loader.current``).

    A logical batch is the one that gets one noisy update; it comes as one or more physical batches.

    Attributes:
        rows: number of real examples. They are rows ``0 .. rows-1``; it is 0 when the logical batch is
            empty. Private: the realised size of a Poisson batch may not be published.
        padded_rows: number of rows in all (at least 1). Rows ``rows .. padded_rows-1`` are padding (zeros)
            and must get zero weight. Both count examples: the loop gets `views` times as many rows.
        first: whether this is the first physical batch of its logical batch. Seeing ``first`` while an
            earlier logical batch is unfinished means that the user abandoned that one: drop its partial sum.
        last: whether this is the last physical batch of its logical batch.
        step: index of the logical batch, counted since the loader was created (over all epochs).
        epoch: index of the epoch, counted since the loader was created.
        first_step_of_epoch: whether the logical batch is the first of its epoch.
        views: rows of the batch that belong to one example, one after the other: view v of example b is row
            ``b * views + v``, and ``[: rows * views]`` are those of real examples.
    """

    rows: int
    padded_rows: int
    first: bool
    last: bool
    step: int
    epoch: int
    first_step_of_epoch: bool
    views: int = 1


class LoaderBase:
    """Keeps `current` and allows one running iterator at a time.

    Attributes:
        current: the physical batch yielded last, which the loop is processing now (also when workers are
            already preparing later ones). None before the first batch and after an epoch has ended. It
            survives a ``break``, so that ``x, y = next(iter(loader))`` can be followed by a step.
        on_batch: called with what `current` becomes, before the loop gets the batch.
        labels_of: what reads the labels off a batch (`class_labels`, or a function of the user's): one integer
            an example, padding included, before views are made of it. None: nobody needs them.
        labels: int64 [padded_rows], the labels of the current batch; None without `labels_of`. Private.
    """

    def __init__(self, views: Views) -> None:
        self.current: BatchInfo | None = None
        self.labels: Tensor | None = None
        self.labels_of: Callable[[Any], Tensor] | None = None
        self._views = views
        self.on_batch: Callable[[BatchInfo | None], None] | None = None
        self._step = 0
        self._epoch = 0
        self._iteration = 0

    def _begin(self) -> int:
        """Start a new iteration, which ends any other, and return its ticket."""
        self._announce(None)
        self._iteration += 1
        return self._iteration

    def _check_running(self, ticket: int) -> None:
        # Two live iterators would both draw the steps after the counter, and `current` cannot describe both.
        if ticket != self._iteration:
            raise RuntimeError(
                f"{type(self).__name__} was iterated again while this iterator was running; "
                "only the latest iterator of a loader may be used"
            )

    @property
    def views(self) -> int:
        """Rows that each example becomes."""
        return self._views.count

    def _deliver(self, batch: Any, info: BatchInfo) -> Any:
        """Publish a batch that has one row an example; return what the loop gets of it."""
        labels = None
        if self.labels_of is not None:
            labels = _checked_labels(self.labels_of(batch), info.padded_rows)
        made = self._views.make(batch, info)
        self._step = info.step + 1
        self._epoch = info.epoch + 1
        self._announce(info, labels)
        return made

    def _announce(self, info: BatchInfo | None, labels: Tensor | None = None) -> None:
        self.current, self.labels = info, labels
        if self.on_batch is not None:
            self.on_batch(info)

    def _load_counters(self, state: Mapping[str, Any]) -> None:
        # Forward only: going back would draw again from a keystream position that has been used.
        self._step = max(self._step, state["step"])
        self._epoch = max(self._epoch, state["epoch"])
        self._begin()


# ---- nested batches: tensors in dicts, lists, tuples and named tuples, as a collate function gives them


def _map_leaves(fn: Callable[[Any, str], Any], batch: Any, path: str = "batch") -> Any:
    if isinstance(batch, MutableMapping):
        # A copy keeps what a mapping type carries besides its items (default_factory, encodings, …).
        mapped = copy.copy(batch)
        mapped.update({k: _map_leaves(fn, v, f"{path}[{k!r}]") for k, v in batch.items()})
        return mapped
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        fields = zip(batch._fields, batch, strict=True)
        return type(batch)(*(_map_leaves(fn, v, f"{path}.{k}") for k, v in fields))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_map_leaves(fn, v, f"{path}[{i}]") for i, v in enumerate(batch))
    return fn(batch, path)


def _map_rows(fn: Callable[[Tensor], Tensor], batch: Any, rows: int | None, verb: str) -> Any:
    """Apply `fn` to every tensor, each of which must have `rows` rows (any number where None)."""

    def on_leaf(leaf: Any, path: str) -> Any:
        if leaf is None:
            return None
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"a batch that has to be {verb} must hold tensors only, got {path} = {type(leaf).__name__}"
            )
        if rows is not None and (leaf.dim() == 0 or leaf.shape[0] != rows):
            raise ValueError(
                f"a batch that has to be {verb} must have one row per example in dimension 0 of each tensor "
                f"({rows} rows), got {path} of shape {tuple(leaf.shape)}"
            )
        return fn(leaf)

    return _map_leaves(on_leaf, batch)


def _uninitialized(like: Tensor, rows: int) -> Tensor:
    # Pinning is kept in the main process; a worker may not touch the CUDA context it was forked with.
    pinned = get_worker_info() is None and like.is_pinned()
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    made = {"dtype": like.dtype, "device": like.device, "pin_memory": pinned, "memory_format": layout}
    return torch.empty((rows, *like.shape[1:]), **made)


def _leaves(batch: Any) -> Iterator[Any]:
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, (list, tuple)):
        yield batch
        return
    for part in batch:
        yield from _leaves(part)


def count_rows(batch: Any) -> int | None:
    """Return the size of dimension 0 of the tensors of `batch`, or None if it is not the same in all."""
    sizes = {t.shape[0] if t.dim() else None for t in _leaves(batch) if isinstance(t, Tensor)}
    return sizes.pop() if len(sizes) == 1 else None


def pad_rows(batch: Any, rows: int, total: int) -> Any:
    """Return `batch` (`rows` rows) with zero rows of the same dtypes appended up to `total` rows."""

    def pad(tensor: Tensor) -> Tensor:
        padded = _uninitialized(tensor, total)
        padded[:rows] = tensor
        padded[rows:] = 0
        return padded

    return _map_rows(pad, batch, rows, "padded")


def zero_rows(batch: Any) -> Any:
    """Return zeros with the shapes and dtypes of `batch`; `batch` itself is left alone."""

    def zero(tensor: Tensor) -> Tensor:
        # Not in place: a collate function may return views of the data set.
        return _uninitialized(tensor, tensor.shape[0]).zero_() if tensor.dim() else torch.zeros_like(tensor)

    return _map_rows(zero, batch, None, "zeroed, since its logical batch is empty,")


def slice_rows(batch: Any, rows: int, start: int, stop: int) -> Any:
    """Return rows ``start .. stop-1`` of every tensor of `batch` (`rows` rows), as views."""
    return _map_rows(lambda t: t[start:stop], batch, rows, "split")


def repeat_rows(batch: Any, rows: int, times: int) -> Any:
    """Return `batch` (`rows` rows) with each row `times` times, one after the other."""
    if times == 1:
        return batch
    return _map_rows(lambda t: t.repeat_interleave(times, dim=0), batch, rows, "repeated")


def pin_rows(batch: Any) -> Any:
    """Return `batch` in page-locked memory; what is not a CPU tensor stays as it is."""

    def pin(leaf: Any, _path: str) -> Any:
        return leaf.pin_memory() if isinstance(leaf, Tensor) and leaf.device.type == "cpu" else leaf

    return _map_leaves(pin, batch)


def measure_rows(batch: Any, examples: int) -> int:
    """Return how many real rows a batch made from `examples` examples has.

    Fewer rows are in order (a collate function may drop broken examples). More rows are refused: then one
    example would own several rows, each clipped on its own, and the sensitivity would no longer be C.
    """
    rows = count_rows(batch)
    if rows is None:
        return examples
    if rows > examples:
        raise ValueError(
            "collate_fn and transform must give at most one row (dimension 0) per example, "
            f"got {rows} rows for {examples} examples"
        )
    return rows


@dataclass(frozen=True)
class Finisher:
    """Collates, transforms and pads; picklable when its functions are, so that it can run in workers."""

    collate_fn: Callable[[list], Any] | None
    transform: Callable[[Any], Any] | None
    pad_to: int | None

    def __call__(self, samples: list) -> tuple[Any, int]:
        """Return (batch, real rows) from a list of examples."""
        return self.finish(self.collate_fn(samples), len(samples))

    def finish(self, batch: Any, examples: int) -> tuple[Any, int]:
        """Return (batch, real rows) from a batch that is collated already."""
        if self.transform is not None:
            batch = self.transform(batch)
        rows = measure_rows(batch, examples)
        total = max(rows, self.pad_to or 1)
        return (pad_rows(batch, rows, total) if total > rows else batch), rows


# ---- labels


def class_labels(batch: Any) -> Tensor:
    """The second element of a (inputs, labels) batch."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(batch[1], Tensor):
        raise ValueError(
            "labels= must be given: a batch is not (inputs, labels, …) with a tensor of labels, but "
            f"a {type(batch).__name__}"
        )
    return batch[1]


def _checked_labels(labels: Any, rows: int) -> Tensor:
    """int64 [rows], or a ValueError that names the argument which says where labels are."""
    if not isinstance(labels, Tensor) or labels.shape != (rows,) or labels.is_floating_point():
        got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels= must give one integer per example of the batch ({rows}), got {got}")
    return labels.long()


# ---- arguments


def check_count(name: str, value: Any, minimum: int = 1) -> None:
    """Raise TypeError or ValueError unless `value` is an int of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_functions(**functions: Any) -> None:
    """Raise TypeError unless each argument is None or callable."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be callable or None, got {type(function).__name__}")


def check_data_loader(loader: Any, samplers: tuple[type, ...], instead: str) -> None:
    """Raise unless `loader` is a plain map-style DataLoader whose batches may be replaced or wrapped.

    Args:
        samplers: the sampler types that are understood (exact types; a subclass may draw anything).
        instead: what the loader is used for, for the messages.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(f"data_loader must be a torch.utils.data.DataLoader, got {type(loader).__name__}")
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise ValueError(
            f"data_loader must iterate as torch's DataLoader does ({instead}), "
            f"got {type(loader).__name__} with an __iter__ of its own"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"data_loader.dataset must be map-style (__len__ and __getitem__): {instead}, "
            f"got the IterableDataset {type(loader.dataset).__name__}"
        )
    if loader.batch_sampler is None:
        raise ValueError("data_loader.batch_size must be an int: it sets the expected batch size, got None")
    if type(loader.batch_sampler) is not BatchSampler:
        raise ValueError(
            f"data_loader.batch_sampler must be the default one: {instead}, "
            f"which a custom batch sampler does not allow, got {type(loader.batch_sampler).__name__}"
        )
    sampler = loader.sampler
    if isinstance(sampler, SubsetRandomSampler):
        raise ValueError(
            "data_loader.sampler must cover the whole data set, got SubsetRandomSampler: "
            "wrap the data instead, DataLoader(torch.utils.data.Subset(dataset, indices), …)"
        )
    if type(sampler) not in samplers:
        names = " or ".join(s.__name__ for s in samplers)
        raise ValueError(f"data_loader.sampler must be {names}: {instead}, got {type(sampler).__name__}")
    if len(loader.dataset) == 0:
        raise ValueError("data_loader.dataset must hold at least 1 example, got 0")
    source = sampler.dataset if isinstance(sampler, DistributedSampler) else sampler.data_source
    if len(source) != len(loader.dataset):
        raise ValueError(
            "data_loader.sampler must draw from the whole data set "
            f"({len(loader.dataset)} examples), got one over {len(source)}"
        )


def check_split(max_batch_size: int | None, pad_to: int | str | None, views: int = 1) -> int | None:
    """Check the arguments that shape physical batches; return the most examples of one, None for any number.

    `max_batch_size` counts the rows that reach the model, `views` of each example; `pad_to` counts examples.
    """
    check_count("views", views)
    if max_batch_size is not None:
        check_count("max_batch_size", max_batch_size)
        if max_batch_size < views:
            raise ValueError(
                f"max_batch_size must hold the {views} views of an example, got {max_batch_size}"
            )
        max_batch_size //= views
    if isinstance(pad_to, str):
        if pad_to != "auto":
            raise ValueError(f"pad_to must be None, 'auto' or an int, got {pad_to!r}")
    elif pad_to is not None:
        check_count("pad_to", pad_to)
        if max_batch_size is not None and pad_to < max_batch_size:
            at_least = f"max_batch_size = {max_batch_size}" if views == 1 else f"{max_batch_size} examples"
            raise ValueError(f"pad_to must be at least {at_least}, got {pad_to}")
    return max_batch_size
