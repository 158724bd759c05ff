"""What goes into the operations and comes out of them, alike for every backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ConvGeometry", "Key", "Like", "Method", "Rounding", "SampleNorms"]


class ConvGeometry(NamedTuple):
    """A convolution's numbers, one for each spatial axis, and its groups."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def out(self, spatial: Sequence[int]) -> list[int]:
        """The output's spatial sizes for an input's."""
        axes = zip(spatial, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in axes]

    def planar(self) -> bool:
        """Whether it is one over images: at most two axes, or a first one of three that the kernel is 1 wide along."""
        if len(self.kernel) < 3:
            return True
        return (self.kernel[0], self.stride[0], self.padding[0]) == (1, 1, 0)


@dataclass
class SampleNorms:
    """What is known about one layer's per-sample weight gradients.

    sqnorms: float64 [B], squared norms of the weight gradient: of what the inputs say up to float64 rounding (C++
      core, reference), or upper bounds that cover their own rounding (GPU kernels).
    magnitudes: float64 [B], the scale rounding in the weighted gradient is proportional to
      (`reference.position_norms_product`), or an upper bound on it. May be None with `kept`, whose sum rounds no
      sample's own part.
    kept: [B, *weight.shape] per-sample weight gradients, when keeping them is cheaper than another
      convolution; then the sum is made from them, and sqnorms are theirs.
    bias: [B, Cout] per-sample bias gradients, if asked for.
    """

    sqnorms: Tensor
    magnitudes: Tensor | None
    kept: Tensor | None
    bias: Tensor | None


class Method(NamedTuple):
    """How per-sample norms are taken: "gram", or "instantiate" with the gradients kept or dropped."""

    way: str
    keep: bool


class Rounding(NamedTuple):
    """How far a weighted gradient can be from the exact one, in units of the root of a sample's magnitude.

    unit: of one rounding in the sum.
    terms: how many of them an entry can pass through in a row. Public: no function of the number of samples.
    operands: of everything that is rounded before it is multiplied, together.
    """

    unit: float
    terms: int
    operands: float = 0.0


class Like(NamedTuple):
    """What of a tensor decides which backend runs, where there is no tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Key:
    """A ChaCha20 key in the host's memory, and in that of the devices that asked for it."""

    __slots__ = ("_there", "host")

    def __init__(self, host: bytes) -> None:
        self.host = host
        self._there: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """int32 [8]: the key's little-endian words, in that device's memory."""
        words = self._there.get(device)
        if words is None:
            words = torch.frombuffer(bytearray(self.host), dtype=torch.int32).to(device)
            self._there[device] = words
        return words
