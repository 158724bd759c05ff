"""Weighted gradients on a GPU: cuDNN's and cuBLAS's products of the inputs and the scaled output gradients.

What is added up is a sum over samples of `c_b g_b`, each of norm at most C by the factor c_b. It must come out in
float32: rounded to 16 bits, a sum moves by a part of its own length, which may be many C, when one sample joins
it. And what is added for a sample must not be longer than its norm says. So

- the product `h = c g` is made in float32;
- 16-bit inputs are widened (exact) and multiplied as TF32, whose 11 bits hold a float16 and a bfloat16 exactly: only h
  is rounded. (cuDNN has no product of 16-bit tensors with a float32 result; a bfloat16 h would round 4 times as far,
  and a float16 h underflow. `adaclip.backends.triton_grads` has one, for the shapes that it suits.) Matrix products of bfloat16 do have a float32 result, and are taken there, with h in
  bfloat16;
- float32 inputs are multiplied as torch's settings say: both are rounded to TF32 where it is allowed.

What that rounds: with |h^ - h| <= u |h| elementwise, the error of sum_t h_t x_t^T is at most u c sum_t |g_t| |x_t|^T
in each entry, whose Frobenius norm is at most u c sqrt(M), M the sample's magnitude
(`reference.position_norms_product`). Hence `Rounding.operands`, in units of sqrt(M), added to the norm before the
factor is made of it.

Sums are taken over at most `_LONGEST` positions at a time, and added up in float64, so that how far they round does
not depend on how many samples there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from adaclip.backends.planes import as_images
from adaclip.backends.values import ConvGeometry, Rounding
from adaclip.reference import live_rows, wide_dtype

__all__ = [
    "conv_grad_rounding",
    "conv_output_unit",
    "conv_weighted_grad",
    "linear_grad_rounding",
    "linear_weighted_grad",
]

# Positions that one product of cuDNN or cuBLAS sums. As in adaclip.reference, but a GPU is not filled by fewer.
_LONGEST = 1 << 16

# The hardware cuts float32 to TF32's 11 bits where a library does not round first.
_TF32 = 2.0**-10

# A float32 sum of tensor cores is cut, not rounded, and cuDNN may sum transformed inputs (Winograd, FFT), whose
# rounding is some times larger.
_SUM_UNIT = 2.0**-20


def conv_weighted_grad(
    x: Tensor, g: Tensor, factors: Tensor, weight: Tensor, geometry: ConvGeometry
) -> Tensor:
    """`sum_b factors_b dL_b/dweight` in float32, bitwise repeatable; rows of factor 0 are not read into it."""
    x, g, factors, geometry = as_images(x, g, factors, geometry)
    kernel, stride, padding, dilation, groups = geometry
    precision = "tf32" if x.dtype != torch.float32 else _precision("conv", x)
    x, h = _scaled(x.float(), g.float(), factors)
    like = x.new_empty(weight.shape[0], weight.shape[1], *kernel)
    total = like.new_zeros(like.shape)
    with _convolutions(precision):
        for i, (xs, hs) in enumerate(_pieces(x, h, h[0, 0].numel() if len(h) else 1)):
            part = torch.ops.aten.convolution_backward(
                hs,
                xs,
                like,
                None,
                list(stride),
                list(padding),
                list(dilation),
                False,
                [0] * len(stride),
                groups,
                [False, True, False],
            )[1]
            total = part if i == 0 else total.double() + part
    return total.float().reshape(weight.shape)


def conv_grad_rounding(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Rounding:
    """The rounding of `conv_weighted_grad` for inputs like x, of any sizes."""
    if x.dtype != torch.float32:
        return Rounding(_SUM_UNIT, _LONGEST + 3, _TF32)
    both = (1 + _TF32) ** 2 - 1 if _precision("conv", x) == "tf32" else 0.0
    return Rounding(_SUM_UNIT, _LONGEST + 3, both)


def conv_output_unit(x: Tensor) -> float:
    """Bounds, relative to |w| * |x|, how far a convolution's output can be from the exact one; with some room.

    For the recorded outputs of inputs like x on a GPU: operands and output are rounded to x's dtype, or the operands to
    TF32. 0.0 on the CPU, whose outputs count as exact.
    """
    if x.device.type != "cuda":
        return 0.0
    if x.dtype != torch.float32:
        return 4 * torch.finfo(x.dtype).eps / 2
    return 4 * (_TF32 if _precision("conv", x) == "tf32" else _SUM_UNIT)


def linear_weighted_grad(a: Tensor, g: Tensor, factors: Tensor) -> Tensor:
    """`sum_b factors_b sum_t g_bt a_bt^T` in float32; rows of factor 0 are not read into it."""
    short = a.dtype == g.dtype == torch.bfloat16
    a, h = _scaled(a if short else a.float(), g.float(), factors)
    total = None
    for xs, hs in _pieces(a, h, a.shape[1]):
        left, right = hs.flatten(0, 1).t(), xs.flatten(0, 1)
        part = torch.mm(left.to(right.dtype), right, out_dtype=torch.float32) if short else left @ right
        total = part if total is None else total.double() + part
    return h.new_zeros(g.shape[-1], a.shape[-1]) if total is None else total.float()


def linear_grad_rounding(a: Tensor) -> Rounding:
    """The rounding of `linear_weighted_grad` for inputs like a."""
    terms = max(a.shape[1], _LONGEST) + 3
    if a.dtype == torch.bfloat16:
        return Rounding(_SUM_UNIT, terms, torch.finfo(torch.bfloat16).eps / 2)
    both = (1 + _TF32) ** 2 - 1 if _precision("matmul", a) == "tf32" else 0.0
    return Rounding(_SUM_UNIT, terms, both)


def _scaled(x: Tensor, g: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """x and factors g, with zeros in the rows of factor 0: 0 times a nan would be one."""
    factors, x, g = live_rows(factors, x, g)
    return x, g * factors.to(wide_dtype(g.dtype)).reshape(-1, *[1] * (g.dim() - 1))


def _pieces(x: Tensor, h: Tensor, positions: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, _LONGEST // max(1, positions))
    return zip(x.split(size), h.split(size), strict=True) if len(x) else iter(())


def _precision(kind: str, x: Tensor) -> str:
    """ "tf32" or "ieee": how torch multiplies float32 on that device now; "conv" or "matmul"."""
    if x.device.type != "cuda":
        return "ieee"
    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    settings = [cudnn.conv if kind == "conv" else cublas]
    if kind == "conv" and not cudnn.enabled:
        settings.append(cublas)  # by which torch's own convolution multiplies
    return "tf32" if any(s.fp32_precision == "tf32" for s in settings) else "ieee"


@contextmanager
def _convolutions(precision: str) -> Iterator[None]:
    """cuDNN with that precision for float32, and with algorithms whose results are bitwise repeatable."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.conv.fp32_precision
    cudnn.deterministic, cudnn.conv.fp32_precision = True, precision
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.conv.fp32_precision = before
