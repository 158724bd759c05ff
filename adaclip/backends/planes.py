"""Convolutions as the GPU kernels take them: over images, dense, in one of two layouts."""

from __future__ import annotations

import torch
from torch import Tensor

from adaclip.backends.values import ConvGeometry

__all__ = ["as_images", "as_planes", "dense"]


def dense(t: Tensor) -> Tensor:
    """[B, C, H, W], contiguous or channels_last: as it is if it is one of them."""
    if t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last):
        return t
    return t.contiguous()


def as_planes(x: Tensor, g: Tensor, geometry: ConvGeometry) -> tuple[Tensor, Tensor, ConvGeometry]:
    """The same per-sample weight gradients as those of a two-dimensional convolution, up to the kernel's shape.

    One axis gets another of size 1 in front. Of three axes the first is one that the kernel is 1 wide along
    (`ConvGeometry.planar`), such as that of a sample's views: its images are laid one below the other, with rows of
    zeros between them so that no kernel sees two. Output rows that fall in between have gradient 0.
    """
    kernel, stride, padding, dilation, groups = geometry
    axes = len(kernel)
    if axes == 2:
        return dense(x), dense(g), geometry
    if axes == 1:
        ones = ([1, *v] for v in (kernel, stride))
        return (
            x.contiguous().unsqueeze(2),
            g.contiguous().unsqueeze(2),
            ConvGeometry(*ones, [0, *padding], [1, *dilation], groups),
        )
    (b, cin, views, height, width), (cout, rows, columns) = x.shape, (g.shape[1], *g.shape[3:])
    (_, k, across), (_, s, beside), (_, p, left), (_, d, apart) = kernel, stride, padding, dilation
    reach = s * (rows - 1) + d * (k - 1) + 1
    block = -(-max(reach, p + height) // s) * s
    stacked = x.new_zeros(b, cin, views, block, width)
    stacked[:, :, :, p : p + height] = x
    below = g.new_zeros(b, cout, views, block // s, columns)
    below[:, :, :, :rows] = g
    geometry = ConvGeometry([k, across], [s, beside], [0, left], [d, apart], groups)
    stacked, below = stacked.flatten(2, 3), below.flatten(2, 3)
    return stacked, below[:, :, : geometry.out(stacked.shape[2:])[0]].contiguous(), geometry


def as_images(
    x: Tensor, g: Tensor, factors: Tensor, geometry: ConvGeometry
) -> tuple[Tensor, Tensor, Tensor, ConvGeometry]:
    """A convolution that is 1 wide along the first of three axes (views of a sample) as one over images.

    Each image gets its sample's factor. Others are left as they are.
    """
    if len(geometry.kernel) < 3 or not geometry.planar():
        return x, g, factors, geometry
    views = x.shape[2]
    x, g = (t.transpose(1, 2).flatten(0, 1) for t in (x, g))
    flat = ConvGeometry(*(v[1:] for v in geometry[:4]), geometry.groups)
    return x, g, factors.repeat_interleave(views), flat
