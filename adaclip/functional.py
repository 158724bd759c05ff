"""Clipping and noise for people who hold per-sample gradients already.

One call does DP-SGD's release (Abadi et al. 2016, arXiv 1607.00133, algorithm 1): norms, clipping factors,
weighted sum, noise and division, in two reads of the gradients. The functions it is made of are here too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from . import ops
from .backends import load
from .clipping import check_norm, clip_factors
from .noise import STREAM_GRADIENT, NoiseSource, address, check_chunks, checked_std, chunks
from .ranges import holds

__all__ = ["clip_and_noise", "clip_factors", "sample_sqnorms", "weighted_sum"]

Grads = TypeVar("Grads", Tensor, list[Tensor], tuple[Tensor, ...], dict[str, Tensor])


@torch.no_grad()
def clip_and_noise(
    per_sample_grads: Grads,
    *,
    max_grad_norm: float,
    noise_multiplier: float,
    denominator: float | None = None,
    source: NoiseSource | bytes | int | torch.Generator | None = None,
    step: int | None = None,
    stream: int = STREAM_GRADIENT,
    return_norms: bool = False,
) -> Grads | tuple[Grads, Tensor]:
    """``(sum_b min(1, C / |g_b|) g_b + N(0, (sigma C)^2 I)) / denominator``, the release of DP-SGD.

    Args:
        per_sample_grads: a tensor [B, ...], or a list, tuple or dict of them, one for each parameter. Sample b is
            row b of all of them, and its norm goes over all of them jointly. B may be 0. Any floating dtype.
        max_grad_norm: C, positive.
        noise_multiplier: sigma, at least 0.
        denominator: what to divide by: the public expected batch size q N. Never the B at hand, which is private
            under Poisson sampling. None: the sum itself.
        source: None (default) takes a new key from the operating system for this call. A `NoiseSource`, or
            what it can be made of, addresses the noise by ``step``.
        step: the number of this release, required with a source: two releases with one step have the same
            noise, and their difference has none.
        stream: with a source, which of its streams.
        return_norms: also return the norms.

    Returns:
        The structure of ``per_sample_grads`` with tensors [...] of the same dtype; with ``return_norms`` a pair of
        that and the norms [B] in float64. The norms are private: they carry no noise.

    Raises:
        TypeError: for another structure.
        ValueError: for an argument out of its range.

    Guarantees: a sample contributes at most C in norm, within a factor 1 + 2^-20, rounding included; with
    the noise this is one Gaussian mechanism of multiplier sigma for adding or removing one sample. A sample with
    nan or inf anywhere contributes nothing. With a source, bits are the same for any number of threads
    and any instruction set.
    """
    tensors = _tensors(per_sample_grads)
    max_grad_norm = check_norm(max_grad_norm)
    std = _std(noise_multiplier, max_grad_norm)
    denominator = 1.0 if denominator is None else check_norm(denominator, "denominator")
    if step is None:
        if source is not None:
            raise ValueError("step must be given with a source: releases that share a step share their noise")
        step = 0
    step, stream = address(step, stream)
    widths = [math.prod(t.shape[1:]) for t in tensors]
    check_chunks(0, sum(map(chunks, widths)))
    if not isinstance(source, NoiseSource):
        source = NoiseSource(source)

    norms = _sqnorms(tensors).sqrt()
    factors = clip_factors(norms, max_grad_norm)
    released, first = [], 0
    for t, width in zip(tensors, widths, strict=True):
        released.append(_noisy_sum(t, factors, source, (step, stream, first), std, denominator))
        first += chunks(width)
    result = _like(per_sample_grads, released)
    return (result, norms) if return_norms else result


def sample_sqnorms(per_sample_grads: Sequence[Tensor]) -> Tensor:
    """Tensors [B, ...] -> float64 [B]: squared norms of sample b's rows in all of them jointly.

    Accumulated in float64; nan or inf where a sample has one. ValueError for other shapes or dtypes.
    """
    return _sqnorms(_tensors(per_sample_grads))


def weighted_sum(x: Tensor, factors: Tensor) -> Tensor:
    """x [B, ...], factors [B] -> ``sum_b factors_b x_b`` [...], in at least float32.

    A row whose factor is 0 does not enter: it may hold nan or inf. ValueError for other shapes or dtypes.
    """
    for name, t in (("x", x), ("factors", factors)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    (x,) = _tensors(x)
    if factors.shape != x.shape[:1] or not factors.is_floating_point() or factors.device != x.device:
        raise ValueError(
            f"factors must be floating [{x.shape[0]}], one per row of x, on {x.device}, "
            f"got {list(factors.shape)} of {factors.dtype} on {factors.device}"
        )
    return ops.weighted_sum(x, factors).to(x.dtype)


def _tensors(grads: object) -> list[Tensor]:
    """The tensors of a structure, checked."""
    if isinstance(grads, Tensor):
        named = {"per_sample_grads": grads}
    elif isinstance(grads, Mapping):
        named = {f"per_sample_grads[{name!r}]": t for name, t in grads.items()}
    elif isinstance(grads, (list, tuple)):
        named = {f"per_sample_grads[{i}]": t for i, t in enumerate(grads)}
    else:
        raise TypeError(f"per_sample_grads must be a tensor, list, tuple or dict, got {type(grads).__name__}")
    if not named:
        raise ValueError("per_sample_grads must hold at least one tensor, got none")
    samples, first = None, next(iter(named))
    for name, t in named.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dim() == 0 or not t.is_floating_point() or t.layout != torch.strided or t.is_meta:
            raise ValueError(
                f"{name} must be dense floating [B, ...], got {list(t.shape)} of {t.dtype}, {t.layout}, on {t.device}"
            )
        samples = t.shape[0] if samples is None else samples
        if t.shape[0] != samples:
            raise ValueError(f"{name} must have {samples} samples like {first}, got {t.shape[0]}")
    return [t.detach() for t in named.values()]


def _like(grads: Grads, released: list[Tensor]) -> Grads:
    if isinstance(grads, Tensor):
        return released[0]
    if isinstance(grads, Mapping):
        return dict(zip(grads, released, strict=True))
    return released if isinstance(grads, list) else tuple(released)


def _std(noise_multiplier: float, max_grad_norm: float) -> float:
    if not holds(noise_multiplier, lambda v: 0 <= v < math.inf):
        raise ValueError(f"noise_multiplier must be finite and at least 0, got {noise_multiplier!r}")
    return checked_std(float(noise_multiplier) * max_grad_norm)


def _sqnorms(tensors: list[Tensor]) -> Tensor:
    total = ops.row_sqnorms(tensors[0])
    for t in tensors[1:]:
        total = total + ops.row_sqnorms(t).to(total.device)
    return total


def _noisy_sum(
    x: Tensor,
    factors: Tensor,
    source: NoiseSource,
    where: tuple[int, int, int],
    std: float,
    denominator: float,
) -> Tensor:
    """One parameter's release; where: step, stream and first chunk of its noise."""
    step, stream, first = where
    backend = ops.resolve_backend("noisy_sum", "auto", x)
    if backend != "reference":
        run = load(backend).noisy_sum
        return run(source.key, step, stream, x, factors.to(x.device), first, std, denominator)
    total = ops.weighted_sum(x, factors.to(x.device))
    noise = source.normal_(torch.empty_like(total), step, stream, std, first)
    return total.add_(noise).div_(denominator).to(x.dtype)
