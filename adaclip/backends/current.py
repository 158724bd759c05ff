"""Which GPU is torch's current one while kernels of ours are launched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["current", "on_its_device"]


def current(device: torch.device) -> AbstractContextManager:
    """A context in which `device` is torch's current one; nothing where it is no GPU.

    torch's operations run where their tensors are. Triton launches on the current device, whatever its arguments are;
    and a second CUDA runtime in the process that turns to another device leaves torch there, too.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def on_its_device(position: int = 0) -> Callable[[Callable], Callable]:
    """Makes an operation run with the device of its argument at `position`, a tensor, as the current one."""

    def decorate(run: Callable) -> Callable:
        @functools.wraps(run)
        def there(*args, **kwargs):
            with current(args[position].device):
                return run(*args, **kwargs)

        return there

    return decorate
