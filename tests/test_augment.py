"""Views that private loaders make: which row is whose, where the numbers come from, what is refused."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, TensorDataset

from adaclip import _core
from adaclip.augment import AUGMENTATIONS, augment
from adaclip.batches import class_labels
from adaclip.epochs import EpochLoader
from adaclip.noise import STREAM_VIEWS, NoiseSource
from adaclip.sampler import PoissonLoader

KEY = bytes(range(32))
Pair = collections.namedtuple("Pair", ["x", "y"])


def images(n: int, side: int = 8, dtype=torch.uint8) -> torch.Tensor:
    """Images of one color each: their index plus one."""
    return torch.arange(1, n + 1, dtype=dtype).reshape(n, 1, 1, 1).expand(n, 3, side, side).contiguous()


def pictures(n: int, *shape: int) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))


# ---- single images


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_view_v_of_image_b_is_row_b_views_plus_v(kind, dtype):
    made = augment(images(5, dtype=dtype), kind, torch.Generator().manual_seed(0), views=3)
    assert made.dtype == dtype
    assert torch.equal(made, images(5, dtype=dtype).repeat_interleave(3, 0))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(["crop", "crop-flip", "shift-flip"]),
    st.integers(0, 99),
)
def test_crops_are_windows_of_the_padded_image(height, width, kind, seed):
    picture = pictures(1, 2, height, width)
    made = augment(picture, kind, torch.Generator().manual_seed(seed), views=6)
    most = [min(4, s - 1) if "crop" in kind else s // 8 for s in (height, width)]
    padded = torch.nn.functional.pad(picture, (most[1], most[1], most[0], most[0]), mode="reflect")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1).flatten(2, 3)[0].transpose(0, 1)
    if "flip" in kind:
        windows = torch.cat([windows, windows.flip(-1)])
    for view in made:
        assert any(torch.equal(view, w) for w in windows)


def test_crops_move_by_up_to_four_pixels_each_way():
    ramp = torch.arange(40.0).expand(1, 1, 40, 40)
    made = augment(ramp, "crop", torch.Generator().manual_seed(0), views=300)
    assert {int(v[0, 20, 20]) - 20 for v in made} == set(range(-4, 5))
    made = augment(ramp.mT, "crop", torch.Generator().manual_seed(0), views=300)
    assert {int(v[0, 20, 20]) - 20 for v in made} == set(range(-4, 5))


def test_images_must_have_four_dimensions():
    with pytest.raises(ValueError, match=r"images must be \[B, C, H, W\], got \(3, 4, 4\)"):
        augment(torch.zeros(3, 4, 4), "flip", torch.Generator())


def test_views_do_not_depend_on_the_default_device():
    picture = pictures(3, 2, 8, 8)
    expected = augment(picture, "crop-flip", torch.Generator().manual_seed(0), views=2)
    with torch.device("meta"):
        made = augment(picture, "crop-flip", torch.Generator("cpu").manual_seed(0), views=2)
    assert torch.equal(made, expected)


# ---- the generator


def test_the_generators_state_is_the_keystream():
    generator = NoiseSource(KEY).generator(5, STREAM_VIEWS)
    words = np.array([_core.chacha20_block(KEY, i, 5, STREAM_VIEWS) for i in range(39)], dtype=np.uint32)
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words.ravel(), "pos": 624}}
    drawn = torch.randint(1 << 16, (2000,), generator=generator).numpy()
    assert np.array_equal(drawn, twister.random_raw(2000) % (1 << 16))


def test_generators_of_other_addresses_and_keys_differ():
    draws = [
        torch.rand(4, generator=NoiseSource(key).generator(step, stream)).tolist()
        for key, step, stream in ((1, 0, 4), (1, 1, 4), (1, 0, 5), (2, 0, 4), (None, 0, 4), (None, 0, 4))
    ]
    assert len({tuple(d) for d in draws}) == 6
    with pytest.raises(ValueError, match="step must be an int"):
        NoiseSource(1).generator(-1, 0)


# ---- loaders


def loaders(n: int = 12, batch: int = 4, **options):
    """A Poisson and an epoch loader over colored images and their labels."""
    data = DataLoader(TensorDataset(images(n), torch.arange(n)), batch_size=batch)
    yield PoissonLoader.from_data_loader(data, source=NoiseSource(7), **options)
    yield EpochLoader(data, source=NoiseSource(7), **options)


@pytest.mark.parametrize("pad", [None, 5])
@pytest.mark.parametrize("most", [None, 6, 7])
def test_every_example_comes_as_rows_next_to_each_other(most, pad):
    for loader in loaders(views=3, augmentation="crop-flip", max_batch_size=most, pad_to=pad):
        assert loader.views == 3
        assert "views=3" in repr(loader)
        seen = collections.Counter()
        for x, y in loader:
            info = loader.current
            assert info.views == 3
            assert len(x) == len(y) == 3 * info.padded_rows
            if most:
                assert info.rows <= 2
            assert info.padded_rows == max(info.rows, pad or 1)
            real = info.rows * 3
            assert not x[real:].any()
            colors = x[:real].flatten(1).float()
            assert torch.equal(colors.amin(1), colors.amax(1))
            assert torch.equal(colors[:, 0].long(), y[:real] + 1)
            assert torch.equal(y.reshape(-1, 3), y[::3, None].expand(-1, 3))
            seen.update(y[:real:3].tolist())
        if isinstance(loader, EpochLoader):
            assert seen == dict.fromkeys(range(12), 1)


def test_one_view_without_augmentation_leaves_batches_alone():
    for options in ({}, {"views": 1, "augmentation": None}, {"augmentation": "none"}):
        text = DataLoader([{"text": "a"}] * 4, batch_size=2)
        assert [b["text"] for b in EpochLoader(text, **options)] == [["a", "a"]] * 2


def test_views_without_augmentation_are_repetitions():
    data = DataLoader([{"x": float(i)} for i in range(4)], batch_size=2)
    assert [b["x"].tolist() for b in EpochLoader(data, views=2)] == [[0, 0, 1, 1], [2, 2, 3, 3]]
    with pytest.raises(TypeError, match=r"repeated must hold tensors only, got batch\['text'\]\[0\] = str"):
        list(EpochLoader(DataLoader([{"text": "a"}] * 4), views=2))


def test_an_empty_logical_batch_is_one_example_of_zeros():
    loader = PoissonLoader(
        (images(5), torch.arange(5)),
        sample_rate=1e-9,
        steps_per_epoch=2,
        views=4,
        augmentation="crop-flip",
    )
    for x, y in loader:
        assert (loader.current.rows, loader.current.padded_rows, loader.current.views) == (0, 1, 4)
        assert x.shape == (4, 3, 8, 8)
        assert not x.any()
        assert y.tolist() == [0] * 4


def drawn(loader):
    return [(loader.current.step, loader.current.first, x) for x, _ in loader]


def test_views_are_those_of_key_and_step():
    def make(source, **options):
        x, y = pictures(30, 1, 9, 9), torch.arange(30)
        return PoissonLoader(
            (x, y), sample_rate=0.3, views=2, augmentation="crop-flip", source=source, **options
        )

    first, again, other = (drawn(make(NoiseSource(k))) for k in (3, 3, 4))
    assert all(torch.equal(a[2], b[2]) for a, b in zip(first, again, strict=True))
    assert not all(
        a[2].shape == b[2].shape and torch.equal(a[2], b[2]) for a, b in zip(first, other, strict=True)
    )
    resumed = make(NoiseSource(3))
    state = make(NoiseSource(3))
    next(iter(state))
    resumed.load_state_dict(state.state_dict())
    assert torch.equal(drawn(resumed)[0][2], first[1][2])
    # Physical batches of one logical batch do not repeat each other's numbers.
    flips = PoissonLoader(
        torch.arange(64.0).expand(40, 1, 1, 64),
        sample_rate=1.0,
        max_batch_size=20,
        augmentation="flip",
        source=NoiseSource(5),
    )
    one, two = (x[:, 0, 0, 0] for x in flips)
    assert not torch.equal(one, two)


def test_views_differ_from_step_to_step_and_are_secret():
    picture = torch.arange(81.0).reshape(1, 1, 9, 9)

    def draw():
        loader = PoissonLoader(picture, sample_rate=1.0, steps_per_epoch=6, views=8, augmentation="crop-flip")
        return [x.flatten().tolist() for x in loader]

    both = draw() + draw()
    assert len({tuple(x) for x in both}) == 12


class Items(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        return images(12)[i], i


def test_workers_and_a_collated_named_tuple():
    data = DataLoader(
        Items(),
        batch_size=4,
        num_workers=1,
        collate_fn=lambda s: Pair(*map(torch.stack, zip(*boxed(s), strict=True))),
    )
    loader = PoissonLoader.from_data_loader(data, views=2, augmentation="flip", source=NoiseSource(1))
    for batch in loader:
        assert isinstance(batch, Pair)
        rows = 2 * loader.current.rows
        assert torch.equal(batch.x[:rows, 0, 0, 0].long(), batch.y[:rows] + 1)


def boxed(samples):
    return [(x, torch.tensor(i)) for x, i in samples]


def test_a_function_makes_the_views():
    def darker(x, generator):
        return x.float() * torch.rand(x.shape[0], 1, 1, 1, generator=generator)

    for loader in loaders(views=2, augmentation=darker):
        for x, y in loader:
            rows = 2 * loader.current.rows
            assert x.dtype == torch.float32
            shares = x[:rows, 0, 0, 0] / (y[:rows] + 1)
            assert len(set(shares.tolist())) == rows
            assert bool((shares < 1).all())


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "views must be at least 1, got 0", {"views": 0}),
        (TypeError, "views must be an int, got 2.0", {"views": 2.0}),
        (
            ValueError,
            "augmentation must be callable or one of none, .* got 'rotate'",
            {"augmentation": "rotate"},
        ),
        (TypeError, "augmentation must be callable or a name, got int", {"augmentation": 3}),
        (
            ValueError,
            "max_batch_size must hold the 4 views of an example, got 3",
            {"views": 4, "max_batch_size": 3},
        ),
        (
            ValueError,
            "pad_to must be at least 3 examples, got 2",
            {"views": 2, "max_batch_size": 7, "pad_to": 2},
        ),
    ],
)
def test_bad_arguments(error, message, options):
    data = DataLoader(TensorDataset(images(4), torch.arange(4)), batch_size=2)
    with pytest.raises(error, match=message):
        PoissonLoader.from_data_loader(data, **options)
    with pytest.raises(error, match=message):
        EpochLoader(data, **options)


def one_image_short(samples):
    return [torch.zeros(1, 4, 4), torch.zeros(2)]


@pytest.mark.parametrize(
    ("message", "data", "augmentation"),
    [
        ("got a batch that is a dict", [{"x": torch.zeros(1, 4, 4)}] * 4, "flip"),
        (r"one image a sample \(2 samples\), got images of shape \(1, 4, 4\)", "odd", "flip"),
        (r"images must be \[B, C, H, W\], got \(2, 4\)", [torch.zeros(4)] * 4, "flip"),
        (r"tensor of 4 rows, one for each view, got \(2, 1, 4, 4\)", "images", lambda x, g: x[::2]),
        (r"tensor of 4 rows, one for each view, got NoneType", "images", lambda x, g: None),
    ],
)
def test_batches_without_images_are_refused(message, data, augmentation):
    collate = None
    if isinstance(data, str):
        if data == "odd":
            collate = one_image_short
        data = [torch.zeros(1, 4, 4)] * 4
    loader = EpochLoader(
        DataLoader(data, batch_size=2, collate_fn=collate), views=2, augmentation=augmentation
    )
    with pytest.raises(ValueError, match=message):
        list(loader)
    assert loader.current is None


# ---- labels


def test_labels_are_those_of_the_examples_padding_included():
    for labels_of in (class_labels, lambda b: b[0][:, 0, 0, 0].clamp_min(1) - 1):
        for loader in loaders(views=2, augmentation="crop", max_batch_size=6, pad_to=4):
            loader.labels_of = labels_of
            assert loader.labels is None
            for _, y in loader:
                info = loader.current
                assert loader.labels.dtype == torch.int64
                assert torch.equal(loader.labels[: info.rows], y[::2][: info.rows])
                assert loader.labels[info.rows :].tolist() == [0] * (4 - info.rows)
            assert loader.labels is None
    for loader in loaders():
        next(iter(loader))
        assert loader.labels is None


@pytest.mark.parametrize(
    ("message", "labels_of"),
    [
        (r"one integer per example of the batch \(4\), got torch.float32 \(4,\)", lambda b: b[1].float()),
        (r"one integer per example of the batch \(4\), got torch.int64 \(3,\)", lambda b: b[1][:3]),
        (r"one integer per example of the batch \(4\), got list", lambda b: b[1].tolist()),
        (r"labels= must be given: a batch is not .* but a Tensor", lambda b: class_labels(b[0])),
        (r"labels= must be given: a batch is not .* but a list", lambda b: class_labels(b[:1])),
    ],
)
def test_labels_that_cannot_be_read_are_refused(message, labels_of):
    loader = EpochLoader(DataLoader(TensorDataset(images(4), torch.arange(4)), batch_size=4))
    loader.labels_of = labels_of
    with pytest.raises(ValueError, match=message):
        next(iter(loader))
    assert loader.current is None
