"""Where a training run computes: the data's place, the precision of products, and how a step is carried out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from adaclip.graphed import GraphedStep
from adaclip.optimizer import DPOptimizer
from adaclip.train_config import TrainConfig

__all__ = ["Place", "fits"]

# Of the GPU's free memory, what data may take; activations need the rest.
_SHARE = 1 / 4


def fits(tensors: tuple[Tensor, ...], free: int) -> bool:
    """Whether they are small enough to stay on a device with so many bytes of free memory."""
    return sum(t.numel() * t.element_size() for t in tensors) <= _SHARE * free


class Place:
    """A device and what a run does differently there. On the CPU: nothing, unless the settings ask for it.

    On a GPU: models and images are channels_last, data stays in its memory if that takes no more than a quarter of
    what is free, and, unless the settings say otherwise, a step is a CUDA graph over padded batches.

    alone: whether this process trains by itself: a graph is of one process.
    precision: "fp32", the default on the CPU; "tf32", the default on a GPU, as torch's own convolutions are; "bf16", under
    autocast. On a GPU it sets torch's switches for the whole process.

    Raises:
        ValueError: TF32 or a graph where there is no GPU for it.
    """

    def __init__(self, config: TrainConfig, device: torch.device, alone: bool = True):
        self.device, self._config = device, config
        self.gpu = device.type == "cuda"
        self.precision = config.precision or ("tf32" if self.gpu else "fp32")
        if self.precision == "tf32" and not self.gpu:
            raise ValueError(f"precision must be fp32 or bf16 on {device.type}, got tf32")
        self.graphed = self.gpu and alone and config.graph and config.max_batch_size is None
        # Fixed shapes, for the graph; nearly every logical batch fits.
        self.pad_to = "auto" if self.graphed else None
        if self.gpu:
            torch.backends.cudnn.conv.fp32_precision = "ieee" if self.precision == "fp32" else "tf32"
            torch.backends.cuda.matmul.fp32_precision = "ieee"

    def model(self, model: nn.Module) -> nn.Module:
        """The model in the layout that the device's convolutions like."""
        return model.to(memory_format=torch.channels_last) if self.gpu else model

    def data(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors on the device, if they all fit there; as they are otherwise."""
        if self.gpu and not fits(tensors, torch.cuda.mem_get_info(self.device)[0]):
            return tensors
        return tuple(t.to(self.device) for t in tensors)

    def here(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; the CPU does not wait for the copy of a pinned one."""
        return tensor.to(self.device, non_blocking=True)

    def images(self, normalized: Tensor) -> Tensor:
        """Images as the model shall get them."""
        return normalized.contiguous(memory_format=torch.channels_last) if self.gpu else normalized

    def autocast(self) -> AbstractContextManager:
        """The precision that forward passes run in."""
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def step(
        self, model: nn.Module, optimizer: DPOptimizer, criterion: Callable[[Tensor, Tensor], Tensor]
    ) -> Callable[[Tensor, Tensor], None]:
        """step(images, labels): forward, backward and, where the batch ends its logical batch, the release."""
        if self.graphed:
            graphed = GraphedStep(model, optimizer, criterion, compile=self._config.compile)

            def replay(images: Tensor, labels: Tensor) -> None:
                with self.autocast():
                    graphed(images, labels)

            return replay
        forward = torch.compile(model) if self._config.compile else model

        def loop(images: Tensor, labels: Tensor) -> None:
            optimizer.zero_grad()
            with self.autocast():
                loss = criterion(forward(images), labels)
            loss.backward()
            optimizer.step()

        return loop
