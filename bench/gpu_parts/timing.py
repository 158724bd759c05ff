"""Times on a GPU by CUDA events, on a CPU (for dry runs) by its clock; and what memory a step takes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

__all__ = ["Memory", "alternate_steps", "kernel_time", "out_of_memory", "peak_of", "release"]

# Longer than any cache: what a kernel reads comes from memory, as in a step.
_FLUSH_BYTES = 256 << 20
_FLUSHES = 4  # in a row: some 0.4 ms, in which the CPU enqueues what is timed
_SHORTEST = 0.03  # seconds that one timing of a step should take at least


def alternate_steps(
    steps: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of one call, round by round: the functions in turn, each as often in a row as fills 30 ms.

    Calls follow each other without waiting, as in a training loop: the CPU may run ahead of the GPU.
    """
    calls = {}
    for name, step in steps.items():
        once = _elapsed(step, 1, device)
        calls[name] = max(1, min(20, round(_SHORTEST / max(once, 1e-9)))) if device.type == "cuda" else 1
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(_elapsed(step, calls[name], device) / calls[name])
    return times


def _elapsed(step: Callable[[], Any], calls: int, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return time.perf_counter() - start
    torch.cuda.synchronize(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def kernel_time(fn: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median seconds of one call that finds nothing in the caches.

    While the cache is overwritten in front of it the CPU enqueues the call, whose launches are then not timed.
    """
    fn()
    if device.type != "cuda":
        return statistics.median(_elapsed(fn, 1, device) for _ in range(rounds))
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    pairs = []
    for _ in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(_FLUSHES):
            flush.zero_()
        start.record()
        fn()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize(device)
    return 1e-3 * statistics.median(start.elapsed_time(end) for start, end in pairs[3:])


class Memory(NamedTuple):
    """Bytes of a GPU: those of living tensors, and those that torch holds for them and for graphs."""

    allocated: int
    reserved: int


def peak_of(step: Callable[[], Any], before: Memory, device: torch.device) -> int | None:
    """Bytes that a step in its stride needs at its peak beyond `before`: parameters, optimizer and graph included.

    A replayed CUDA graph allocates nothing, and its memory counts as free between replays; but torch never gives it
    back. So what stays reserved when everything free was given back counts as well.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before.allocated
    torch.cuda.empty_cache()
    return max(peak, torch.cuda.memory_reserved(device) - before.reserved)


def release(device: torch.device) -> Memory:
    """Give back what nobody holds any more; returns what is held."""
    gc.collect()
    if device.type != "cuda":
        return Memory(0, 0)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return Memory(torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the GPU has no more memory, in whichever way."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
