"""The Poisson loader: what the accounting assumes of it, and what a training loop sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils.data import (
    TensorDataset,
)

from adaclip.batches import BatchInfo
from adaclip.noise import NoiseSource
from adaclip.sampler import PoissonLoader


def numbers(size: int) -> torch.Tensor:
    """Examples that are their own index plus one, so that zeros can only be padding."""
    return torch.arange(1, size + 1)


def logical_batches(loader: PoissonLoader, epochs: int = 1) -> list[list[int]]:
    """Example indices of each logical batch of a loader over `numbers`, checking `current` on the way."""
    steps: list[list[int]] = []
    for _ in range(epochs):
        for batch in loader:
            info = loader.current
            assert batch.shape[0] == info.padded_rows >= max(1, info.rows)
            assert not batch[info.rows :].any()
            if info.first:
                steps.append([])
                assert info.step == len(steps) - 1
            steps[-1] += (batch[: info.rows] - 1).tolist()
        assert info.last
        assert loader.current is None
    return steps


# ---- what the accounting assumes


def test_every_example_is_included_independently_with_the_sample_rate():
    size, q, steps = 400, 0.1, 2000
    loader = PoissonLoader(numbers(size), sample_rate=q, steps_per_epoch=steps, source=NoiseSource(1))
    taken = np.zeros((steps, size), dtype=np.int8)
    for t, batch in enumerate(logical_batches(loader)):
        taken[t, batch] = 1

    total = stats.binomtest(int(taken.sum()), steps * size, q)
    assert total.pvalue > 1e-4
    per_example = taken.sum(0)
    chi2 = ((per_example - steps * q) ** 2 / (steps * q * (1 - q))).sum()
    assert 1e-4 < stats.chi2.sf(chi2, size) < 1 - 1e-4
    # The batch size is binomial, not fixed: its variance is what a shuffled batch would not have.
    batch_size = taken.sum(1)
    spread = ((batch_size - size * q) ** 2).sum() / (size * q * (1 - q))
    assert 1e-4 < stats.chi2.sf(spread, steps) < 1 - 1e-4
    # Pairs: the same example in successive steps, neighbouring examples in one step.
    for a, b in ((taken[1:], taken[:-1]), (taken[:, 1:], taken[:, :-1])):
        assert stats.binomtest(int((a & b).sum()), a.size, q * q).pvalue > 1e-4


def test_no_keystream_position_is_used_twice():
    class Recorder(NoiseSource):
        def bernoulli(self, n, q, step, stream=1):
            used.append((step, stream))
            return super().bernoulli(n, q, step, stream)

    used: list[tuple[int, int]] = []
    loader = PoissonLoader(numbers(30), sample_rate=0.1, max_batch_size=2, source=Recorder(2))
    steps = logical_batches(loader, epochs=3)
    assert len(set(used)) == len(used) == len(steps) == 30
    assert steps[:10] != steps[10:20] != steps[20:]


def test_a_fixed_key_replays_and_a_fresh_one_does_not():
    def draw(source):
        return logical_batches(PoissonLoader(numbers(50), sample_rate=0.2, source=source), epochs=2)

    assert draw(NoiseSource(3)) == draw(NoiseSource(3)) != draw(NoiseSource(4))
    assert draw(None) != draw(None)


@pytest.mark.parametrize("options", [{"max_batch_size": 3}, {"pad_to": "auto"}, {"pad_to": 5}])
def test_splitting_and_padding_do_not_change_the_sample(options):
    def draw(**options):
        loader = PoissonLoader(numbers(60), sample_rate=0.1, source=NoiseSource(5), **options)
        return logical_batches(loader, epochs=2)

    assert draw(**options) == draw()


@pytest.mark.parametrize("options", [{}, {"max_batch_size": 3}, {"pad_to": "auto"}])
@pytest.mark.parametrize("world", [2, 3, 7])
def test_processes_share_the_sample_of_one(world, options):
    def loader(rank, world, **options):
        return PoissonLoader(
            numbers(60), sample_rate=0.1, source=NoiseSource(6), rank=rank, world_size=world, **options
        )

    parts = [loader(rank, world, **options) for rank in range(world)]
    assert {p.expected_batch_size for p in parts} == {6.0}
    batches = [logical_batches(p, epochs=3) for p in parts]
    for t, whole in enumerate(logical_batches(loader(0, 1), epochs=3)):
        assert sorted(i for mine in batches for i in mine[t]) == sorted(whole)
        sizes = [len(mine[t]) for mine in batches]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("workers", [0, 1])
def test_processes_take_as_many_physical_batches(workers):
    seen = []
    for rank in range(3):
        loader = PoissonLoader(
            range(40),
            sample_rate=0.1,
            source=NoiseSource(6),
            rank=rank,
            world_size=3,
            max_batch_size=1,
            num_workers=workers,
        )
        seen.append([])
        for batch in loader:
            info = loader.current
            assert len(batch) == info.padded_rows == max(1, info.rows)
            seen[-1].append((info.step, info.first, info.last))
    assert seen[0] == seen[1] == seen[2]
    # Some had parts of others' batches only.
    assert len(seen[0]) > len({step for step, _, _ in seen[0]})


def test_processes_draw_views_of_their_own():
    images = torch.arange(8 * 64, dtype=torch.float32).reshape(8, 1, 8, 8)
    made = [
        next(
            iter(
                PoissonLoader(
                    images,
                    sample_rate=1.0,
                    augmentation=lambda x, generator: torch.rand(len(x), generator=generator),
                    source=NoiseSource(7),
                    rank=rank,
                    world_size=2,
                )
            )
        )
        for rank in range(2)
    ]
    assert not set(made[0].tolist()) & set(made[1].tolist())


# ---- logical and physical batches


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 60),
    q=st.floats(1e-4, 1.0),
    most=st.none() | st.integers(1, 20),
    pad=st.none() | st.just("auto") | st.integers(0, 8),
    key=st.integers(0, 2**32),
)
def test_any_shape_of_loader(size, q, most, pad, key):
    if isinstance(pad, int):
        pad = (most or 1) + pad
    loader = PoissonLoader(
        numbers(size),
        sample_rate=q,
        steps_per_epoch=12,
        max_batch_size=most,
        pad_to=pad,
        source=NoiseSource(key),
    )
    steps: list[list[int]] = []
    finished = True
    for batch in loader:
        info = loader.current
        assert info.first == finished
        finished = info.last
        if info.first:
            steps.append([])
        assert info.rows <= (loader.max_batch_size or size)
        assert info.padded_rows == len(batch) == max(1, info.rows, loader.pad_to or 0)
        assert (batch[: info.rows] > 0).all()
        assert not batch[info.rows :].any()
        # Every physical batch but the last of its logical batch is full.
        assert info.last or info.rows == loader.max_batch_size
        assert info.first_step_of_epoch == (info.step == 0)
        steps[-1] += (batch[: info.rows] - 1).tolist()
    assert finished
    assert len(steps) == len(loader) == 12
    assert steps == [NoiseSource(key).bernoulli(size, q, t).tolist() for t in range(12)]


def test_an_empty_logical_batch_is_one_row_of_zeros():
    data = TensorDataset(torch.ones(5, 3, 4, 4), torch.full((5,), 7), torch.ones(5, dtype=torch.bool))
    loader = PoissonLoader(data, sample_rate=1e-9, steps_per_epoch=3)
    for step, (x, y, z) in enumerate(loader):
        assert loader.current == BatchInfo(0, 1, True, True, step, 0, step == 0)
        assert x.shape == (1, 3, 4, 4)
        assert not x.any()
        assert y.dtype == torch.int64
        assert y.tolist() == [0]
        assert z.tolist() == [False]
    assert step == 2
    assert data.tensors[0].min() == 1  # the placeholder was zeroed in a copy
    padded = PoissonLoader(data, sample_rate=1e-9, steps_per_epoch=1, pad_to=4)
    assert [len(x) for x, *_ in padded] == [4]


def test_empty_batches_pass_through_a_model_and_a_mean_loss():
    loader = PoissonLoader(
        (torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)), sample_rate=1e-9, steps_per_epoch=1
    )
    (x, y), *_ = loader
    assert torch.nn.functional.cross_entropy(torch.nn.Linear(6, 3)(x), y).isfinite()


def test_pad_to_auto_is_a_public_size_that_nearly_always_suffices():
    loader = PoissonLoader(
        numbers(10_000), sample_rate=0.01, steps_per_epoch=200, pad_to="auto", source=NoiseSource(8)
    )
    assert loader.pad_to == loader.max_batch_size == 144  # 100 + 4·9.95, in eights
    whole = 0
    for batch in loader:
        assert len(batch) == 144
        whole += loader.current.first and loader.current.last
    assert whole >= 199
    assert PoissonLoader(numbers(10), sample_rate=1.0, pad_to="auto").pad_to == 10
    assert PoissonLoader(numbers(10), sample_rate=0.5, pad_to="auto", max_batch_size=3).pad_to == 3


def test_an_abandoned_logical_batch_is_never_resumed():
    loader = PoissonLoader(numbers(40), sample_rate=0.5, max_batch_size=4, source=NoiseSource(9))
    next(iter(loader))
    left = loader.current
    assert (left.first, left.last, left.step, left.rows) == (True, False, 0, 4)  # kept after a `break`
    batches = iter(loader)
    assert loader.current is None
    batch = next(batches)
    assert (loader.current.first, loader.current.step, loader.current.epoch) == (True, 1, 1)
    assert (batch - 1).tolist() == NoiseSource(9).bernoulli(40, 0.5, 1)[:4].tolist()


def test_only_the_latest_iterator_runs():
    loader = PoissonLoader(numbers(20), sample_rate=0.1)
    older = iter(loader)
    next(older)
    newer = iter(loader)
    next(newer)
    with pytest.raises(RuntimeError, match="iterated again"):
        next(older)
    next(newer)
    assert loader.current is not None


def test_state_dict_continues_without_the_key():
    def make():
        return PoissonLoader(numbers(50), sample_rate=0.2, steps_per_epoch=6, source=NoiseSource(10))

    straight = logical_batches(make(), epochs=2)
    first, second = make(), make()
    for _, _batch in zip(range(4), first, strict=False):
        state = first.state_dict()
    assert state == {"step": 4, "epoch": 1, "sample_rate": 0.2, "dataset_size": 50}
    second.load_state_dict(state)
    assert [(b - 1).tolist() for b in second if second.current.rows] == [s for s in straight[4:10] if s]
    second.load_state_dict(state)  # going back must not draw steps 4 to 9 again
    assert second.state_dict()["step"] == 10
    with pytest.raises(ValueError, match=r"sample_rate must be that of the saved loader, 0\.2, got 0\.1"):
        PoissonLoader(numbers(50), sample_rate=0.1).load_state_dict(state)
