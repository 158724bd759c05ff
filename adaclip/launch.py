"""What torchrun says of the processes it has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["launched", "local_rank", "process_count"]


def process_count() -> int:
    """How many processes torchrun has started together with this one, itself included; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def local_rank() -> int:
    """This process's number on its machine: that of the GPU it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def launched() -> Iterator[None]:
    """In here torch.distributed is initialized, if torchrun has started more than one process.

    Its host messages go over gloo, tensors on GPUs over NCCL. torch is imported only then.
    """
    if process_count() == 1:
        yield
        return
    import torch
    from torch import distributed as dist

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend)
    try:
        yield
    finally:
        dist.destroy_process_group()
