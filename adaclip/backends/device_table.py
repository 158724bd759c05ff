"""The arrays in device memory that tell a kernel of many tensors where they are, made once for a set of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaclip.kernels.step_table import StepTable, to_device
from adaclip.step_rule import FusedStep, Move

__all__ = ["moves_table", "step_table"]

_STD, _VARIANCE, _FLOOR_SQ = 0, 12, 13  # columns of core/noisy_step.h's StepRule


def step_table(fused: FusedStep) -> StepTable:
    """The table of a noisy update, with its numbers of this step. The CPU waits for nothing."""
    params = [tensors[0] for tensors in fused.tensors]
    table = _table(fused.cache, fused.tensors, params, fused.first_chunks, fused.rules)
    if fused.stds is None:
        return table
    table.rules[:, _STD].copy_(fused.stds)
    if fused.terms is not None:
        decay, unbias, floor, least = _refreshed(fused.cache, "terms", fused.terms, fused.stds.device).unbind(
            1
        )
        std = fused.stds.double()
        fused.averages.mul_(decay).add_((1 - decay) * std * std)
        table.rules[:, _VARIANCE].copy_(fused.averages * unbias)
        table.rules[:, _FLOOR_SQ].copy_(torch.maximum(floor * std, least).square())
    return table


def moves_table(moves: Sequence[Move], cache: dict[str, Any]) -> StepTable:
    """The table of `adaclip.kernels.perturb`."""
    rules = [(m.std, m.length) for m in moves]
    return _table(cache, [m[:4] for m in moves], [m.param for m in moves], [m.first for m in moves], rules)


def _table(
    cache: dict[str, Any],
    tensors: Sequence[tuple[Tensor | None, ...]],
    params: Sequence[Tensor],
    first_chunks: Sequence[int],
    rules: Sequence[tuple[float, ...]],
) -> StepTable:
    pointers = [[0 if t is None else t.data_ptr() for t in row] for row in tensors]
    device, sizes = params[0].device, [p.numel() for p in params]
    kind = device, sizes, list(first_chunks)
    if cache.get("kind") != kind:
        _refuse_capture(device)
        cache.clear()
        cache["kind"] = kind
        cache["table"] = StepTable.make(pointers, sizes, first_chunks, rules, device)
    elif not _capturing(device):
        table: StepTable = cache["table"]
        _copy(table.pointers, pointers)
        _copy(table.rules, rules)
    return cache["table"]


def _refreshed(
    cache: dict[str, Any], name: str, rows: Sequence[Sequence[float]], device: torch.device
) -> Tensor:
    """float64 [P, any]: the numbers in device memory, always at the same place."""
    if name not in cache:
        _refuse_capture(device)
        cache[name] = to_device(torch.tensor(rows, dtype=torch.float64, device="cpu"), device)
    elif not _capturing(device):
        _copy(cache[name], rows)
    return cache[name]


def _copy(there: Tensor, rows: Sequence[Sequence[float]]) -> None:
    host = torch.tensor(rows, dtype=there.dtype, device="cpu").reshape(there.shape)
    if there.device.type == "cuda":
        # torch's allocator of pinned memory gives a block out again only when the copies that read it are over.
        host = host.pin_memory()
    there.copy_(host, non_blocking=True)


def _capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: its replays read what the arrays hold then, so nothing is copied now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _refuse_capture(device: torch.device) -> None:
    if _capturing(device):
        raise RuntimeError(
            "the table of parameters must be made before a CUDA graph is captured: run a step first"
        )
