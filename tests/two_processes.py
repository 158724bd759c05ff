"""Runs a function in several processes of one gloo group on this machine.

The processes are forked off a server that has imported adaclip already, so each group costs a fraction of a second.
"""

from __future__ import annotations

import datetime
import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import distributed as dist

# Long enough for a machine that does other things, short enough to notice that a process hangs.
LIMIT = 120.0
# What the server imports before it is forked.
_BEFORE = [
    "adaclip.engine",
    "torch.distributed.fsdp",
    "scipy.stats",
    "pytest",
    "hypothesis",
    "shared_training",
]


def run(function: Callable[..., Any], *args: Any, world: int = 2, timeout: float = 60.0) -> list[Any]:
    """`function(*args)` in each of `world` processes; returns what each returned, or the exception that it raised.

    timeout: of the process group, in seconds. A process that is not done after LIMIT seconds is killed: AssertionError.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_BEFORE)
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        pipes, processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_process, args=(theirs, store, rank, world, timeout, function, args), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        results = [_receive(pipe) for pipe in pipes]
        for process in processes:
            process.join(10)
            process.kill()
    return results


def _receive(pipe: Any) -> Any:
    assert wait([pipe], LIMIT), f"a process has not ended after {LIMIT} s"
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return RuntimeError("the process died")


def _process(
    pipe: Any, store: str, rank: int, world: int, timeout: float, function: Callable, args: tuple
) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=limit)
    try:
        result: Any = function(*args)
    except Exception as error:
        traceback.print_exc()
        result = error
    # Not pipe.send: torch would share a tensor's memory, which ends with this process.
    pipe.send_bytes(pickle.dumps(result))
    pipe.close()
    if not isinstance(result, Exception):
        dist.destroy_process_group()
