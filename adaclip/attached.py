"""A model in training: what stands in the place of its parts, and how they are put back."""

from __future__ import annotations

from contextlib import nullcontext

from torch import nn

from adaclip.epochs import EpochLoader
from adaclip.layers import Layer, ReplacedForward, RootForward, Tape, build_reliefs, plain_module
from adaclip.optimizer import DPOptimizer
from adaclip.sampler import PoissonLoader
from adaclip.update import PrivateStepOnly

__all__ = ["Attached"]


class Attached:
    """From when it is made, the model's forwards record per-sample gradients; until `detach`.

    Attributes:
        module: as it was given; model: without what torch.compile and DistributedDataParallel put around it.
        optimizer, loader: the private ones.
    """

    def __init__(
        self,
        module: nn.Module,
        model: nn.Module,
        optimizer: DPOptimizer,
        loader: PoissonLoader | EpochLoader,
        tape: Tape,
        layers: list[Layer],
    ):
        self.module, self.model, self.optimizer, self.loader = module, model, optimizer, loader
        self._wrapper = plain_module(module)
        if self._wrapper is not model:
            # Its reducer would wait for gradients that never come by its way.
            self._synced = self._wrapper.require_backward_grad_sync
            self._wrapper.require_backward_grad_sync = False
        reliefs = build_reliefs(model, layers)
        for layer in [*layers, *reliefs]:
            layer.attach()
        point = optimizer.smoothing
        # Made last: the root may be a layer itself, and then counts around its adapter.
        root = RootForward(model, tape, nullcontext if point is None else point.away)
        root.attach()
        guard = PrivateStepOnly(optimizer.original_optimizer)
        guard.attach()
        self._replaced: list[ReplacedForward | PrivateStepOnly] = [root, *layers, *reliefs, guard]
        if point is not None:
            point.attach(model)
            loader.on_batch = optimizer.note_batch

    def is_of(self, module: nn.Module) -> bool:
        """Whether that is the model, compiled or not."""
        return plain_module(module) is self._wrapper

    def detach(self) -> None:
        """Put everything back: ordinary forwards, no hook, no private gradients."""
        if self.optimizer.smoothing is not None:
            # First: it raises where a parameter was written to at the evaluation point, and can be called again.
            self.loader.on_batch = None
            self.optimizer.smoothing.detach()
        if self._wrapper is not self.model:
            self._wrapper.require_backward_grad_sync = self._synced
        for replaced in self._replaced:
            replaced.detach()
        self.optimizer._sum.reset()
        for p in self.model.parameters():
            p.grad = None
            if p.grad_dtype != p.dtype:
                p.grad_dtype = p.dtype
