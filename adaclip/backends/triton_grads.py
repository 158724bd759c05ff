"""Weighted gradients of 16-bit convolutions by a Triton kernel: tensor cores take 16 bits at twice the rate of TF32.

Factors are applied to each sample's own gradient, in float32 (`adaclip.kernels.conv_weighted_grad`), so no operand is
rounded. `adaclip.backends.choice` says for which shapes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaclip.backends.current import on_its_device
from adaclip.backends.planes import as_images, as_planes
from adaclip.backends.values import ConvGeometry, Rounding

__all__ = ["conv_grad_rounding", "conv_weighted_grad"]

# Tensor cores cut a float32 sum where IEEE arithmetic rounds it; as much room as for cuDNN's.
_SUM_UNIT = 2.0**-20


@on_its_device()
def conv_weighted_grad(
    x: Tensor, g: Tensor, factors: Tensor, weight: Tensor, geometry: ConvGeometry
) -> Tensor:
    """`sum_b factors_b dL_b/dweight` in float32, bitwise repeatable; rows of factor 0 do not enter.

    x, g: both bfloat16 or both float16. geometry: planar (`ConvGeometry.planar`).
    """
    from adaclip.kernels.conv_weighted_grad import conv_weighted_grad

    x, g, factors, geometry = as_images(x, g, factors, geometry)
    x, g, geometry = as_planes(x, g, geometry)
    total = conv_weighted_grad(x, g, factors.to(torch.float32).contiguous(), **geometry._asdict())
    return total.reshape(weight.shape)


def conv_grad_rounding(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Rounding:
    """The rounding of `conv_weighted_grad` for these; the sizes of one sample decide."""
    from adaclip.kernels.conv_weighted_grad import roundings_in_a_row

    # Of three axes the first is that of images, each of which is scaled when it is whole.
    images = g.shape[2] if len(geometry.kernel) == 3 else 1
    positions = math.prod(g.shape[2:]) // max(1, images)
    return Rounding(_SUM_UNIT, roundings_in_a_row(positions))
