"""Random views of a batch of images: each drawn for its own image, from numbers that no image decides.

Views replace their image before its gradient is clipped, so a sample still contributes once, at most C: one view
of each, or several whose gradients are averaged (De et al. 2022, arXiv 2204.13650, augmentation multiplicity).
The numbers go by position in the batch: without one image, every later one gets other views. Only while the
generator is secret does a view tell nothing about the others; one with a known seed would let a single image
move many contributions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adaclip.batches import BatchInfo, check_count, repeat_rows
from adaclip.columns import to_device
from adaclip.noise import STREAM_VIEWS, NoiseSource

__all__ = ["AUGMENTATIONS", "Augmentation", "Views", "augment", "check_augmentation"]

AUGMENTATIONS = ("none", "shift", "flip", "shift-flip", "crop", "crop-flip")
Augmentation = str | Callable[[Tensor, torch.Generator], Tensor]
# Pixels of the largest shift, as a share of the image's side: 4 of 32, 3 of 28.
_SHIFT = 1 / 8
# Pixels that the image is padded with on each side before a crop of its own size.
_PADDING = 4


def augment(images: Tensor, kind: str, generator: torch.Generator, views: int = 1) -> Tensor:
    """Random views of every image.

    Args:
        images: [B, C, H, W], any dtype, any device.
        kind: "none"; "shift": by up to an eighth of each side, edges reflected; "crop": of the image's size from
            the image padded by 4 pixels on each side, reflected; "flip": left-right with probability 1/2;
            "shift-flip", "crop-flip": both.
        generator: on the CPU, where the numbers are drawn (wherever the images are); never start it from a known seed in a private run.
        views: V, how many of each.

    Returns:
        [B V, C, H, W] of the same dtype, on the same device: view v of image b is row b V + v. `images` itself
        for one view of "none".
    """
    if kind not in AUGMENTATIONS:
        raise ValueError(f"kind must be one of {', '.join(AUGMENTATIONS)}, got {kind!r}")
    if images.dim() != 4:
        raise ValueError(f"images must be [B, C, H, W], got {tuple(images.shape)}")
    if kind == "none":
        return images if views == 1 else images.repeat_interleave(views, dim=0)
    count, height, width = images.shape[0] * views, *images.shape[2:]
    # Three numbers a view go to the images' device; where each pixel comes from is worked out there.
    drawn = [_offsets(count, side, kind, generator) for side in (height, width)]
    drawn.append(
        torch.randint(2, (count, 1), generator=generator, device="cpu") if "flip" in kind else drawn[0]
    )
    down, right, flipped = to_device(torch.stack(drawn), images.device).unbind()
    rows, columns = _sources(down, height), _sources(right, width)
    if "flip" in kind:
        columns = torch.where(flipped.bool(), columns.flip(1), columns)
    positions = (rows[:, :, None] * width + columns[:, None, :]).reshape(count, 1, -1)
    flat = images.flatten(2).repeat_interleave(views, dim=0) if views > 1 else images.flatten(2)
    return flat.gather(2, positions.expand(-1, images.shape[1], -1)).reshape(count, *images.shape[1:])


def _offsets(count: int, side: int, kind: str, generator: torch.Generator) -> Tensor:
    """int64 [count, 1]: how far each view is moved along a side."""
    most = 0
    if "shift" in kind:
        most = int(side * _SHIFT)
    elif "crop" in kind:
        # A reflection does not reach beyond the image.
        most = min(_PADDING, side - 1)
    if most == 0:
        return torch.zeros(count, 1, dtype=torch.int64, device="cpu")
    return torch.randint(-most, most + 1, (count, 1), generator=generator, device="cpu")


def _sources(offsets: Tensor, side: int) -> Tensor:
    """int64 [count, side]: where each position of a view is taken from, reflected at the edges."""
    moved = (torch.arange(side, device=offsets.device) + offsets).abs()
    return side - 1 - (side - 1 - moved).abs()


def check_augmentation(augmentation: Augmentation | None) -> None:
    """Raise TypeError or ValueError unless `augmentation` is None, a name of `AUGMENTATIONS`, or callable."""
    if isinstance(augmentation, str):
        if augmentation not in AUGMENTATIONS:
            names = ", ".join(AUGMENTATIONS)
            raise ValueError(f"augmentation must be callable or one of {names}, got {augmentation!r}")
    elif augmentation is not None and not callable(augmentation):
        raise TypeError(f"augmentation must be callable or a name, got {type(augmentation).__name__}")


class Views:
    """Makes the views of a private loader's batches.

    Every sample becomes V rows, one after the other, so that row b V + v of every tensor is view v of sample b;
    the images are augmented, everything else (labels) is repeated. The images are the batch itself or its first
    element.

    Args:
        count: V, at least 1.
        augmentation: None (nothing is drawn); a name of `AUGMENTATIONS`; or a function (images [B V, C, …], the
            samples repeated; a CPU generator) -> the views, row by row as many. It must make each row of that
            row alone, with numbers of the generator that no image decides: a sample's views may depend neither
            on other samples nor on how many there are.
        source: where the generator of each logical batch comes from, at the address (its step, `stream`).
        stream: of this process: two processes that share a source must not draw the same views.

    Raises:
        TypeError, ValueError: for arguments as described; from `make`, for batches without such images.
    """

    def __init__(
        self,
        count: int,
        augmentation: Augmentation | None,
        source: NoiseSource,
        stream: int = STREAM_VIEWS,
    ) -> None:
        check_count("views", count)
        check_augmentation(augmentation)
        self.count = count
        self._augmentation = None if augmentation == "none" else augmentation
        self._source, self._stream = source, stream
        self._generator: torch.Generator | None = None

    @property
    def active(self) -> bool:
        """Whether `make` changes anything."""
        return self.count > 1 or self._augmentation is not None

    def make(self, batch: Any, info: BatchInfo) -> Any:
        """The views of a batch that has a row for each of `info.padded_rows` samples."""
        if self._augmentation is None:
            return batch if self.count == 1 else repeat_rows(batch, info.padded_rows, self.count)
        if info.first or self._generator is None:
            self._generator = self._source.generator(info.step, self._stream)
        if isinstance(batch, Tensor):
            return self._augmented(batch, info.padded_rows)
        if not isinstance(batch, (tuple, list)) or not batch or not isinstance(batch[0], Tensor):
            raise ValueError(
                "augmentation needs images as the batch or as its first element, got a batch that is "
                f"a {type(batch).__name__}"
            )
        images = self._augmented(batch[0], info.padded_rows)
        parts = [images, *(repeat_rows(part, info.padded_rows, self.count) for part in batch[1:])]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)

    def _augmented(self, images: Tensor, rows: int) -> Tensor:
        if images.dim() == 0 or images.shape[0] != rows:
            raise ValueError(
                f"augmentation needs one image a sample ({rows} samples), got images of shape {tuple(images.shape)}"
            )
        if isinstance(self._augmentation, str):
            return augment(images, self._augmentation, self._generator, self.count)
        views = self._augmentation(images.repeat_interleave(self.count, dim=0), self._generator)
        expected = rows * self.count
        if not isinstance(views, Tensor) or views.dim() == 0 or views.shape[0] != expected:
            got = tuple(views.shape) if isinstance(views, Tensor) else type(views).__name__
            raise ValueError(
                f"augmentation must return a tensor of {expected} rows, one for each view, got {got}"
            )
        return views
