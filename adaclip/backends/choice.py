"""How per-sample norms are taken on a GPU: from a measured table, or, for shapes it does not hold, a cost model.

`table.json` is keyed by GPU architecture, operation and shape class, and written by `python -m bench.tune_backends`
on a GPU of that architecture. A class is public: no choice depends on the number of samples, because how a norm
is taken decides its last digits, and one sample's norm may not depend on who else is there.

The cost model counts, for one sample, products, additions and bytes, at rates of one H100's data sheet halved. None
of it is measured; only ratios decide.

    gram         T^2/2 (Cin + Cout) products, T^2/2 additions for each tap, x and g read
    instantiate  T D Cout products, x and g read; kept: D Cout floats written and, for the sum, read
    and if nothing is kept, the weight gradient: T D Cout products in TF32, x and g read, scaled g written and read;
                 16-bit ones also by a kernel: T D Cout products in 16 bits, D Cout products and additions, x and g read

with T output positions, D = taps times input channels, per group of channels. Gradients are kept where that costs
less in all, and takes no more than 1.5 times the memory of g, which is then not held until the factors are known.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adaclip.backends.values import ConvGeometry, Method

__all__ = [
    "TABLE",
    "architecture",
    "conv_class",
    "conv_method",
    "conv_sums",
    "linear_class",
    "linear_method",
    "measured",
    "read_table",
]

TABLE = Path(__file__).with_name("table.json")

_PRODUCTS = {2: 400e12, 4: 60e12}  # a second, by bytes of an element; float32 as three products in TF32
_TF32_PRODUCTS = 200e12
_ADDITIONS = 15e12
_BYTES = 1.5e12
_LARGEST_KEPT = 1.5
# Bytes moved for each 16-bit value that cuDNN multiplies as TF32: read, written in float32 (and scaled), read again.
_WIDENED = 10


def read_table(path: Path = TABLE) -> dict[str, dict[str, Any]]:
    """{architecture: {operation and class: {"way", "keep", "backend"}}}."""
    return json.loads(path.read_text())["entries"]


@functools.cache
def _entries() -> dict[str, dict[str, Any]]:
    return read_table()


@functools.cache
def architecture(device: torch.device) -> str:
    """The name of a GPU's architecture in the table, "sm_90" for example."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def measured(device: torch.device, shape_class: str) -> dict[str, Any] | None:
    """The table's entry for a class on that device's architecture, if it has one."""
    if device.type != "cuda":
        return None
    return _entries().get(architecture(device), {}).get(shape_class)


def _power(n: int) -> int:
    """n rounded up to a power of two."""
    return 1 << max(0, n - 1).bit_length()


def _pairs(values: Sequence[int]) -> str:
    return "x".join(map(str, values))


def conv_class(
    spatial: Sequence[int],
    channels: int,
    out_channels: int,
    geometry: ConvGeometry,
    dtype: torch.dtype,
    operation: str = "conv_sample_norms",
) -> str:
    """The class of a convolution: sizes rounded up to powers of two. operation: or "conv_weighted_grad"."""
    positions = _power(math.prod(geometry.out(spatial)))
    sizes = f"{_power(channels)}>{_power(out_channels)} at {positions}"
    taps = f"kernel {_pairs(geometry.kernel)} stride {_pairs(geometry.stride)} dilation {_pairs(geometry.dilation)}"
    return f"{operation} {_name(dtype)} {sizes} {taps} groups {geometry.groups}"


def linear_class(positions: int, inputs: int, outputs: int, dtype: torch.dtype) -> str:
    """The class of a linear layer: sizes rounded up to powers of two."""
    sizes = f"{_power(inputs)}>{_power(outputs)} at {_power(positions)}"
    return f"linear_sample_norms {_name(dtype)} {sizes}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def conv_method(
    device: torch.device,
    spatial: Sequence[int],
    channels: int,
    out_channels: int,
    geometry: ConvGeometry,
    dtype: torch.dtype,
) -> Method:
    """How the norms of a convolution's weight gradient are to be taken."""
    entry = measured(device, conv_class(spatial, channels, out_channels, geometry, dtype))
    if entry is not None:
        return Method(entry["way"], entry["keep"])
    positions, taps = math.prod(geometry.out(spatial)), math.prod(geometry.kernel)
    phases = math.prod(min(s, k) for s, k in zip(geometry.stride, geometry.kernel, strict=True))
    # Input positions that meet in the Gram form: those of one phase of the stride with each other.
    image = min(math.prod(spatial), phases * positions)
    inputs, outputs = channels // geometry.groups, out_channels // geometry.groups
    read = inputs * math.prod(spatial) + outputs * positions
    return _cheaper(positions, image**2 / phases, inputs, outputs, taps, read, torch.finfo(dtype).bits // 8)


def conv_sums(
    device: torch.device,
    spatial: Sequence[int],
    channels: int,
    out_channels: int,
    geometry: ConvGeometry,
    dtype: torch.dtype,
) -> str:
    """What sums a convolution's weighted gradient: "triton" (16-bit tensors over planes alone) or "cudnn"."""
    if dtype not in (torch.bfloat16, torch.float16) or not geometry.planar():
        return "cudnn"
    shape = spatial, channels, out_channels, geometry, dtype
    entry = measured(device, conv_class(*shape, "conv_weighted_grad"))
    if entry is not None:
        return entry["backend"]
    positions, groups = math.prod(geometry.out(spatial)), geometry.groups
    depth, outputs = math.prod(geometry.kernel) * (channels // groups), out_channels // groups
    read = channels * math.prod(spatial) + out_channels * positions
    # Tiles of 16 x 16 x 16 at least, and every sample's sum is scaled and added.
    entries = groups * max(depth, 16) * max(outputs, 16)
    triton = 2 * max(positions, 16) * entries / _PRODUCTS[2] + 2 * entries / _ADDITIONS + 2 * read / _BYTES
    cudnn = 2 * positions * groups * depth * outputs / _TF32_PRODUCTS + read * _WIDENED / _BYTES
    return "triton" if triton <= cudnn else "cudnn"


def linear_method(
    device: torch.device, positions: int, inputs: int, outputs: int, dtype: torch.dtype
) -> Method:
    """How the norms of a linear layer's weight gradient are to be taken."""
    if positions <= 1:
        return Method("gram", False)
    entry = measured(device, linear_class(positions, inputs, outputs, dtype))
    if entry is not None:
        return Method(entry["way"], entry["keep"])
    read = positions * (inputs + outputs)
    return _cheaper(positions, positions**2, inputs, outputs, 1, read, torch.finfo(dtype).bits // 8)


def _cheaper(
    positions: int, input_pairs: float, inputs: int, outputs: int, taps: int, read: int, size: int
) -> Method:
    entries = taps * inputs * outputs
    reading = read * size / _BYTES
    gram = (
        (input_pairs * inputs + positions**2 * outputs) / _PRODUCTS[size]
        + 0.5 * positions**2 * taps / _ADDITIONS
        + reading
    )
    instantiate = 2 * positions * entries / _PRODUCTS[size] + reading
    keeping = 2 * entries * 4 / _BYTES
    scaled = positions * outputs * 4
    weight_gradient = 2 * positions * entries / _TF32_PRODUCTS + reading + 2 * scaled / _BYTES
    small = 4 * entries <= _LARGEST_KEPT * positions * outputs * size
    if small and instantiate + keeping <= min(gram, instantiate) + weight_gradient:
        return Method("instantiate", True)
    return Method("instantiate" if instantiate <= gram else "gram", False)
