"""`opacus.distributed`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from adaclip.opacus._replacements import raise_import_error

__all__ = ["DifferentiallyPrivateDistributedDataParallel"]


class DifferentiallyPrivateDistributedDataParallel(nn.Module):
    """Gives every process the parameters of the first one, and is a module around the model, as in Opacus.

    It reduces no gradients: clipped sums are the engine's affair.

    Raises:
        RuntimeError: torch.distributed has not been initialized.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        if not torch.distributed.is_initialized():
            raise RuntimeError("torch.distributed must be initialized first: call init_process_group")
        with torch.no_grad():
            for p in model.parameters():
                torch.distributed.broadcast(p, 0)
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def __getattr__(name: str) -> Any:
    raise_import_error(__name__, name)
