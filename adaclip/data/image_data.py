"""An image data set in memory, its public normalization, and stratified splits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """A labeled image data set, held in memory as bytes.

    Attributes:
        name: the name it was loaded by.
        train_images: uint8 [N, C, H, W].
        train_labels: int64 [N], values in 0 … len(classes) - 1.
        test_images: uint8 [M, C, H, W].
        test_labels: int64 [M].
        classes: the class names, in label order.
        mean, std: C floats each, of pixels scaled to 0 … 1. They are public constants written in this
            package's source (0.5 where no constant is in common use) and are never computed from the images
            loaded: statistics of private images would be a release that the accountant does not see.
        duplicates_removed: test images that were left out because a training image has the same pixels.

    Raises:
        ValueError: shapes, dtypes, label range or constants that do not fit together.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    duplicates_removed: int = 0

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            if images.dtype != torch.uint8 or images.dim() != 4:
                raise ValueError(
                    f"{split}_images must be uint8 [N, C, H, W], got {images.dtype} {tuple(images.shape)}"
                )
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                raise ValueError(
                    f"{split}_labels must be int64 [{len(images)}], got {labels.dtype} {tuple(labels.shape)}"
                )
            if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < len(self.classes)):
                raise ValueError(
                    f"{split}_labels must be in 0 … {len(self.classes) - 1}, "
                    f"got {int(labels.min())} … {int(labels.max())}"
                )
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(
                f"train_images and test_images must have the same [C, H, W], got "
                f"{tuple(self.train_images.shape[1:])} and {tuple(self.test_images.shape[1:])}"
            )
        if not (len(self.mean) == len(self.std) == self.in_channels and all(s > 0 for s in self.std)):
            raise ValueError(
                f"mean and std must be {self.in_channels} numbers each, std > 0, got {self.mean}, {self.std}"
            )

    def __repr__(self) -> str:
        return (
            f"ImageData({self.name!r}, train={len(self.train_labels)}, test={len(self.test_labels)}, "
            f"shape={tuple(self.train_images.shape[1:])}, classes={len(self.classes)})"
        )

    @property
    def in_channels(self) -> int:
        """C: 1 or 3."""
        return self.train_images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.train_images.shape[2], self.train_images.shape[3]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def normalize(self, batch: Tensor) -> Tensor:
        """``(batch / 255 - mean) / std`` per channel.

        Args:
            batch: uint8 [..., C, H, W] on any device; memory format is kept.

        Returns:
            float32 of the same shape, a new tensor.

        Only Python scalars enter, so a GPU is not synchronized.
        """
        if batch.dtype != torch.uint8 or batch.dim() < 3 or batch.shape[-3] != self.in_channels:
            raise ValueError(
                f"batch must be uint8 [..., {self.in_channels}, H, W], got {batch.dtype} {tuple(batch.shape)}"
            )
        out = batch.to(torch.float32)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            out.select(-3, channel).mul_(1 / (255 * std)).sub_(mean / std)
        return out

    def holdout(self, fraction: float, seed: int = 0) -> ImageData:
        """The training images alone, split for tuning: the test images never take part in a choice.

        Args:
            fraction: share of each class to hold out, in (0, 1).
            seed: of the split; the same seed gives the same split on every machine.

        Returns:
            an ImageData whose ``train_*`` is the kept part and whose ``test_*`` is the held-out part.
        """
        kept, held = stratified_split(self.train_labels, fraction, seed)
        return dataclasses.replace(
            self,
            train_images=self.train_images[kept],
            train_labels=self.train_labels[kept],
            test_images=self.train_images[held],
            test_labels=self.train_labels[held],
            duplicates_removed=0,
        )


def stratified_split(labels: Tensor, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split indices so that every class gives the same share.

    Args:
        labels: int64 [N].
        fraction: share of each class in the second part, in (0, 1). A class of n examples gives
            round(fraction·n) of them, and at least one to either part when n >= 2.
        seed: 0 … 2³² - 1. The permutation is numpy's frozen MT19937 ``RandomState``, so that the split is
            the same for every numpy version.

    Returns:
        (first, second): int64 indices, ascending, disjoint, together 0 … N - 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be in (0, 1), got {fraction}")
    if labels.dim() != 1:
        raise ValueError(f"labels must be [N], got {tuple(labels.shape)}")
    array = labels.cpu().numpy()
    random = np.random.RandomState(seed)
    held = np.zeros(len(array), dtype=bool)
    for label in np.unique(array):
        members = np.flatnonzero(array == label)
        count = int(fraction * len(members) + 0.5)
        if len(members) >= 2:
            count = min(max(count, 1), len(members) - 1)
        held[random.permutation(members)[:count]] = True
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))
