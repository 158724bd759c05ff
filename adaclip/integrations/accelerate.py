"""Hugging Face Accelerate: one function in the place of `accelerator.prepare` for what is made private."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader

from adaclip.batches import LoaderBase
from adaclip.engine import PrivacyEngine
from adaclip.integrations.state import PrivacyState

__all__ = ["prepare"]


class PrivateOptimizer(AcceleratedOptimizer):
    """Accelerate's wrapper of a private optimizer. Its schedulers step with logical batches, not with their parts."""

    _is_accelerate_prepared = True

    @property
    def step_was_skipped(self) -> bool:
        batch = self.optimizer.batch
        return batch is not None and not batch.last


class OnDevice:
    """The private loader with its batches on a device: what Accelerate does for the loaders that it prepares.

    Nothing is fetched ahead: Accelerate's own loaders hold one batch back, and the engine checks the rows of the
    batch in hand.
    """

    def __init__(self, loader: LoaderBase, device: torch.device):
        self.loader, self.device = loader, device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return (send_to_device(batch, self.device, non_blocking=True) for batch in self.loader)

    def __getattr__(self, name: str) -> Any:
        if name in ("loader", "device"):
            raise AttributeError(name)
        return getattr(self.loader, name)


def prepare(
    accelerator: Accelerator,
    engine: PrivacyEngine,
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: DataLoader,
    **options: Any,
) -> tuple[nn.Module, PrivateOptimizer, OnDevice]:
    """Make model, optimizer and loader private and prepare them, for an unchanged Accelerate loop.

        engine = PrivacyEngine()
        model, optimizer, loader = prepare(
            accelerator, engine, module=model, optimizer=optimizer, data_loader=loader,
            target_epsilon=3, target_delta=1e-5, epochs=20)
        scheduler = accelerator.prepare(torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=20 * len(loader)))
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(criterion(model(x), y))
            optimizer.step()
            scheduler.step()

    Args:
        accelerator: of one process, without gradient accumulation or a gradient scaler ("no" or "bf16" precision).
        module, optimizer, data_loader: plain ones. The module moves to the accelerator's device.
        options: the other arguments of `make_private`, or, with a target_epsilon, of `make_private_with_epsilon`.

    `accelerator.save_state` and `load_state` carry the privacy state too. (Accelerate reads it with pickle, which
    executes what it finds: load files that you trust, or use `engine.save_checkpoint`, which executes nothing.)
    Where `max_batch_size` splits logical batches, steps, zero_grad and prepared schedulers act on the last part only.

    Raises:
        ValueError: the accelerator does what private training cannot have. The errors of `make_private`.
    """
    _check(accelerator)
    make = engine.make_private_with_epsilon if "target_epsilon" in options else engine.make_private
    module.to(accelerator.device)
    module, private, loader = make(module=module, optimizer=optimizer, data_loader=data_loader, **options)
    prepared = PrivateOptimizer(private, device_placement=False)
    module, prepared = accelerator.prepare(module, prepared)
    accelerator.register_for_checkpointing(PrivacyState(engine))
    return module, prepared, OnDevice(loader, accelerator.device)


def _check(accelerator: Accelerator) -> None:
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps must be 1, got {accelerator.gradient_accumulation_steps}: give the DataLoader "
            "a batch_size that many times larger, and max_batch_size, the old one"
        )
    if accelerator.scaler is not None:
        raise ValueError(
            f"mixed_precision must be 'no' or 'bf16', got {accelerator.mixed_precision!r}: its gradient scaler scales "
            "the loss before the gradients are clipped"
        )
    if accelerator.num_processes != 1:
        raise ValueError(f"accelerator must be of one process, got {accelerator.num_processes}")
