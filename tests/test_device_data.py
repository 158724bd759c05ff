"""Batches of data that stays on a device: gathered, padded and augmented there, and never read back.

On "meta", which has no values, whatever runs reads none: a device's batches are found by shape there, and by value on
the CPU.
"""

import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from adaclip.augment import AUGMENTATIONS, augment
from adaclip.batches import class_labels
from adaclip.columns import TensorColumns, to_device
from adaclip.noise import NoiseSource
from adaclip.sampler import PoissonLoader
from adaclip.train_device import fits

META = torch.device("meta")
KEY = bytes(range(32))


def columns(device, n=40):
    images = torch.arange(n * 3 * 6 * 5).reshape(n, 3, 6, 5).to(torch.uint8)
    return images.to(device), (torch.arange(n) % 7).to(device)


def loader(device, **options):
    options = {"sample_rate": 0.2, "steps_per_epoch": 12, "source": NoiseSource(KEY)} | options
    return PoissonLoader(columns(device), **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pad_to": "auto"},
        {"pad_to": 5, "views": 2, "augmentation": "crop-flip"},
        {"sample_rate": 0.01, "pad_to": 4, "augmentation": "shift"},  # empty batches, too
    ],
)
def test_batches_are_made_on_the_device_without_reading_it(options):
    there, here = loader(META, **options), loader("cpu", **options)
    for made in (there, here):
        made.labels_of = class_labels
    infos = []
    for (x, y), (true_x, true_y) in zip(there, here, strict=True):
        assert x.device == y.device == there.labels.device == META
        assert (x.shape, x.dtype, y.shape, y.dtype) == (
            true_x.shape,
            true_x.dtype,
            true_y.shape,
            true_y.dtype,
        )
        # Sizes come from the host's keystream.
        assert there.current == here.current
        infos.append(there.current)
    assert len({info.rows for info in infos}) > 1


def test_reading_would_fail_there():
    with pytest.raises(RuntimeError, match="meta"):
        columns(META)[0].sum().item()


@pytest.mark.parametrize("kind", AUGMENTATIONS)
@pytest.mark.parametrize("views", [1, 3])
def test_views_are_made_on_the_device_without_reading_it(kind, views):
    images = columns("cpu", 4)[0]
    there = augment(images.to(META), kind, torch.Generator().manual_seed(1), views)
    here = augment(images, kind, torch.Generator().manual_seed(1), views)
    assert there.device == META
    assert (there.shape, there.dtype) == (here.shape, here.dtype)


def test_the_generator_is_left_alike_wherever_the_images_are():
    """A view's numbers do not depend on the device: they are drawn on the host, in one order."""
    after = []
    for device in (META, "cpu"):
        generator = torch.Generator().manual_seed(1)
        augment(columns(device, 4)[0], "crop-flip", generator, 2)
        after.append(generator.get_state())
    assert torch.equal(*after)


def test_columns_of_two_devices_are_gathered_where_they_are():
    x, y = columns("cpu")
    picked = TensorColumns.of((x.to(META), y)).select(torch.tensor([3, 1]))
    assert picked[0].device == META
    assert picked[1].tolist() == [3, 1]


def test_indices_go_to_a_gpu_by_one_pinned_copy(monkeypatch):
    calls = []

    class Host:
        def pin_memory(self):
            calls.append("pinned")
            return self

        def to(self, device, non_blocking=False):
            calls.append((device, non_blocking))
            return "there"

    device = torch.device("cuda", 0)
    assert to_device(Host(), device) == "there"
    assert calls == ["pinned", (device, True)]


def test_data_stays_on_the_device_if_it_takes_a_quarter_of_what_is_free():
    x, y = columns("cpu")
    size = x.numel() + 8 * y.numel()
    assert fits((x, y), 4 * size)
    assert not fits((x, y), 4 * size - 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_a_gpus_batches_equal_the_hosts(kind):
    there, here = (loader(d, pad_to="auto", views=2, augmentation=kind) for d in ("cuda", "cpu"))
    with torch.cuda.device(0):
        torch.cuda.set_sync_debug_mode("error")
        try:
            made = list(there)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for (x, y), (true_x, true_y) in zip(made, here, strict=True):
        assert torch.equal(x.cpu(), true_x)
        assert torch.equal(y.cpu(), true_y)


def test_a_subset_is_gathered_whatever_the_default_device():
    data = TensorDataset(torch.arange(6.0))
    with torch.device("meta"):
        found = TensorColumns.of(Subset(data, [5, 1, 3]))
    assert found.select(torch.tensor([0, 2]))[0].tolist() == [5.0, 3.0]
