"""Where the Poisson loader gets its examples: tensors, map-style data sets, workers, a DataLoader."""

from __future__ import annotations

import collections

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from adaclip.noise import NoiseSource
from adaclip.sampler import PoissonLoader

Point = collections.namedtuple("Point", ["x", "y"])


class Items(Dataset):
    """A map-style data set that is no TensorDataset: example i is (row of i's, i)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if not 0 <= i < self.size:
            raise IndexError(i)
        return torch.full((2,), float(i)), i


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1)


def numbers(size: int) -> torch.Tensor:
    """Examples that are their own index plus one, so that zeros can only be padding."""
    return torch.arange(1, size + 1)


# ---- where the data comes from


def test_torch_loader_path_gives_the_same_batches_as_tensors():
    def draw(data):
        loader = PoissonLoader(data, sample_rate=0.1, max_batch_size=3, pad_to=4, source=NoiseSource(11))
        return [(x, y, loader.current) for x, y in loader]

    size = 30
    x = torch.arange(float(size))[:, None].expand(size, 2)
    for ours, theirs in zip(draw((x, torch.arange(size))), draw(Items(size)), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        assert ours[2] == theirs[2]


def init_worker(worker: int) -> None:
    assert isinstance(torch.utils.data.get_worker_info().dataset, Items)


def test_workers_keep_order_with_empty_batches_and_an_early_exit():
    def make(**options):
        loader = DataLoader(Items(40), batch_size=2, **options)
        return PoissonLoader.from_data_loader(loader, max_batch_size=2, source=NoiseSource(12))

    def draw(loader):
        return [(y.tolist(), loader.current) for _, y in loader]

    plain = make()
    workers = make(num_workers=2, persistent_workers=True, prefetch_factor=4, worker_init_fn=init_worker)
    first = draw(plain)
    assert draw(workers) == first
    assert any(info.rows == 0 for _, info in first)
    assert any(not info.last for _, info in first)
    for loader in (plain, workers):
        next(iter(loader))  # the workers have prefetched far beyond; those draws were not delivered
        assert loader.state_dict()["step"] == 21
    assert draw(plain) == draw(workers)


def test_subsets_of_tensors_are_gathered_in_memory():
    data = TensorDataset(numbers(20))
    inner = Subset(Subset(data, list(range(10, 20))), torch.tensor([3, 1, 9]))
    loader = PoissonLoader(inner, sample_rate=1.0, steps_per_epoch=1)
    assert loader.dataset_size == 3
    assert [b[0].tolist() for b in loader] == [[14, 12, 20]]
    negative = PoissonLoader(Subset(data, [-1, 0]), sample_rate=1.0)
    assert [b[0].tolist() for b in negative] == [[20, 1]]


def test_containers_are_those_of_the_data():
    x, y = torch.zeros(4, 2), torch.arange(4)
    kinds = {tuple: (x, y), list: [x, y]}
    for kind, data in kinds.items():
        (batch,) = PoissonLoader(data, sample_rate=1.0)
        assert type(batch) is kind
    (batch,) = PoissonLoader(TensorDataset(x, y), sample_rate=1.0)
    assert type(batch) is list
    # As a DataLoader's data set, a list of tensors is a list of examples.
    loader = PoissonLoader.from_data_loader(DataLoader([torch.ones(3)] * 5, batch_size=5))
    assert loader.dataset_size == 5
    assert [b.shape for b in loader] == [(5, 3)]


def test_transform_works_on_the_whole_batch_before_padding():
    images = torch.full((12, 1, 2, 2), 255, dtype=torch.uint8)
    loader = PoissonLoader(
        (images, torch.ones(12)),
        sample_rate=0.2,
        pad_to=6,
        transform=lambda b: (b[0].float() / 255 + 1, b[1]),
    )
    for x, _ in loader:
        assert x.dtype == torch.float32
        assert (x[: loader.current.rows] == 2).all()
        assert not x[loader.current.rows :].any()
    loader = PoissonLoader(Items(5), sample_rate=1.0, transform=lambda b: b[1] + 10)
    assert [b.tolist() for b in loader] == [[10, 11, 12, 13, 14]]


def nested(samples):
    y = torch.tensor([i for _, i in samples])
    return {"p": Point(y, [y.double()]), "none": None, "pair": (y[:, None], y > 0)}


def test_nested_structures_are_padded():
    loader = PoissonLoader(
        Items(9), sample_rate=1.0, steps_per_epoch=1, max_batch_size=6, pad_to=7, collate_fn=nested
    )
    batches = list(loader)
    assert len(batches) == 2
    last = batches[1]
    assert last["p"].x.tolist() == [6, 7, 8, 0, 0, 0, 0]
    assert isinstance(last["p"], Point)
    assert last["p"].y[0].dtype == torch.float64
    assert last["none"] is None
    assert last["pair"][0].shape == (7, 1)
    assert last["pair"][1].tolist() == [True] * 3 + [False] * 4


@pytest.mark.parametrize(("q", "reason"), [(1.0, "padded"), (1e-9, "logical batch is empty")])
def test_leaves_that_cannot_be_padded_are_refused(q, reason):
    loader = PoissonLoader(
        Items(3), sample_rate=q, steps_per_epoch=1, pad_to=4, collate_fn=lambda s: {"text": ["a"] * len(s)}
    )
    with pytest.raises(TypeError, match=r"must hold tensors only, got batch\['text'\]\[0\] = str"):
        list(loader)
    loader = PoissonLoader(
        Items(3), sample_rate=q, steps_per_epoch=1, collate_fn=lambda s: [torch.ones(len(s)), ["a"] * len(s)]
    )
    if q == 1.0:
        assert len(list(loader)) == 1  # nothing to pad, nothing to refuse
    else:
        with pytest.raises(TypeError, match=reason):
            list(loader)


def test_tensors_without_a_row_per_example_are_refused_when_padding():
    def collate(samples):
        return torch.ones(len(samples)), torch.ones(2, 5)

    loader = PoissonLoader(Items(3), sample_rate=1.0, pad_to=4, collate_fn=collate)
    with pytest.raises(ValueError, match=r"\(3 rows\), got batch\[1\] of shape \(2, 5\)"):
        list(loader)


def test_an_example_may_not_own_two_rows():
    loader = PoissonLoader(
        (torch.ones(4), torch.ones(4)), sample_rate=1.0, transform=lambda b: [t.repeat(2) for t in b]
    )
    with pytest.raises(ValueError, match=r"at most one row .* per example, got 8 rows for 4 examples"):
        list(loader)


def test_a_collate_function_may_drop_examples():
    def collate(samples):
        return torch.tensor([i for _, i in samples if i != 1])

    loader = PoissonLoader(Items(4), sample_rate=1.0, pad_to=4, collate_fn=collate)
    assert [b.tolist() for b in loader] == [[0, 2, 3, 0]]
    loader = PoissonLoader(Items(2), sample_rate=1.0, max_batch_size=1, collate_fn=collate)
    assert [(b.tolist(), loader.current.rows) for b in loader] == [([0], 1), ([0], 0)]


def test_a_data_set_that_grows_is_refused():
    data = list(range(5))
    loader = PoissonLoader(data, sample_rate=0.5)
    data.append(5)
    with pytest.raises(RuntimeError, match="keep its size of 5 examples, got 6"):
        list(loader)


# ---- from a DataLoader


def test_from_data_loader_takes_its_rate_and_size():
    data = TensorDataset(numbers(1000))
    loader = PoissonLoader.from_data_loader(DataLoader(data, batch_size=64, shuffle=True, drop_last=True))
    assert loader.sample_rate == 0.064
    assert loader.expected_batch_size == 64
    assert len(loader) == loader.steps_per_epoch == 16
    assert loader.dataset is data
    assert (loader.rank, loader.world_size) == (0, 1)
    assert "sample_rate=0.064" in repr(loader)
    for size in range(1, 200):
        exact = PoissonLoader.from_data_loader(DataLoader(range(200), batch_size=size))
        assert exact.expected_batch_size == size
    assert PoissonLoader(numbers(1000), sample_rate=1e-15).expected_batch_size == pytest.approx(1e-12)


def test_from_data_loader_keeps_collation_and_generator():
    generator = torch.Generator()
    theirs = DataLoader(Items(6), batch_size=6, collate_fn=nested, generator=generator)
    loader = PoissonLoader.from_data_loader(theirs, transform=lambda b: b["p"].x)
    assert [b.tolist() for b in loader] == [[0, 1, 2, 3, 4, 5]]


def test_from_data_loader_reads_the_distributed_sampler():
    data = TensorDataset(numbers(100))
    theirs = DataLoader(data, batch_size=5, sampler=DistributedSampler(data, num_replicas=4, rank=3))
    for ranks in ({}, {"rank": 3, "world_size": 4}):
        loader = PoissonLoader.from_data_loader(theirs, source=NoiseSource(1), **ranks)
        assert (loader.rank, loader.world_size, loader.sample_rate) == (3, 4, 0.2)
        assert loader.expected_batch_size == 20
    with pytest.raises(ValueError, match=r"rank and world_size must agree .* \(3, 4\), got \(1, 4\)"):
        PoissonLoader.from_data_loader(theirs, rank=1, world_size=4)


class OwnOrder(DataLoader):
    def __iter__(self):
        yield 0


def bad_loaders():
    data = TensorDataset(numbers(10))
    yield "map-style .* IterableDataset Endless", DataLoader(Endless(), batch_size=2)
    yield "batch_size must be an int", DataLoader(data, batch_size=None)
    yield "batch_sampler must be the default", DataLoader(data, batch_sampler=[[0, 1]])
    weighted = WeightedRandomSampler([1.0] * 10, 10)
    yield "got WeightedRandomSampler", DataLoader(data, batch_size=2, sampler=weighted)
    yield "wrap the data", DataLoader(data, batch_size=2, sampler=SubsetRandomSampler([0, 1]))
    yield "whole data set .10 examples., got one over 5", DataLoader(data, sampler=RandomSampler(range(5)))
    yield "at least 1 example, got 0", DataLoader(TensorDataset(numbers(0)))
    yield "at most the size of the data set, got 11 > 10", DataLoader(data, batch_size=11)
    yield "__iter__ of its own", OwnOrder(data)


@pytest.mark.parametrize(("message", "loader"), list(bad_loaders()))
def test_loaders_that_poisson_sampling_would_change_silently_are_refused(message, loader):
    with pytest.raises(ValueError, match=message):
        PoissonLoader.from_data_loader(loader)


@pytest.mark.parametrize("sampler", [RandomSampler, SequentialSampler])
def test_ordinary_samplers_are_accepted(sampler):
    loader = PoissonLoader.from_data_loader(DataLoader(Items(8), batch_size=2, sampler=sampler(Items(8))))
    assert loader.sample_rate == 0.25


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"sample_rate must be in \(0, 1\], got 0", {"sample_rate": 0}),
        (ValueError, r"sample_rate must be in \(0, 1\], got 1.5", {"sample_rate": 1.5}),
        (ValueError, r"sample_rate must be in \(0, 1\], got nan", {"sample_rate": float("nan")}),
        (TypeError, "sample_rate must be a float, got '0.1'", {"sample_rate": "0.1"}),
        (ValueError, "steps_per_epoch must be at least 1, got 0", {"steps_per_epoch": 0}),
        (TypeError, "steps_per_epoch must be an int, got 2.0", {"steps_per_epoch": 2.0}),
        (ValueError, "max_batch_size must be at least 1, got 0", {"max_batch_size": 0}),
        (TypeError, "max_batch_size must be an int, got True", {"max_batch_size": True}),
        (ValueError, "pad_to must be None, 'auto' or an int, got 'max'", {"pad_to": "max"}),
        (ValueError, "pad_to must be at least 1, got 0", {"pad_to": 0}),
        (ValueError, "pad_to must be at least max_batch_size = 4, got 3", {"max_batch_size": 4, "pad_to": 3}),
        (ValueError, "num_workers must be at least 0, got -1", {"num_workers": -1}),
        (ValueError, "need num_workers > 0", {"prefetch_factor": 2}),
        (ValueError, "rank must be less than world_size = 2, got 2", {"rank": 2, "world_size": 2}),
        (ValueError, "source must be given where world_size is 6", {"world_size": 6}),
        (ValueError, "world_size must be at most 32768", {"world_size": 32769}),
        (TypeError, "source must be an adaclip.noise.NoiseSource or None, got int", {"source": 3}),
        (TypeError, "transform must be callable or None, got int", {"transform": 3}),
        (ValueError, "columns must come without collate_fn", {"collate_fn": list}),
        (TypeError, "dataset must be map-style", {"dataset": iter([1])}),
        (TypeError, "dataset must be map-style", {"dataset": Endless()}),
        (ValueError, "at least 1 example, got 0", {"dataset": torch.ones(0, 2)}),
        (ValueError, r"share dimension 0, got shapes", {"dataset": (torch.ones(5), torch.ones(4))}),
    ],
)
def test_bad_arguments(error, message, change):
    arguments = {"dataset": (torch.ones(5, 2),), "sample_rate": 0.5} | change
    with pytest.raises(error, match=message):
        PoissonLoader(arguments.pop("dataset"), **arguments)


def test_not_a_data_loader():
    with pytest.raises(TypeError, match=r"must be a torch.utils.data.DataLoader, got list"):
        PoissonLoader.from_data_loader([1])
