"""Which adapter trains which module, and how a model is covered by them."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from adaclip.layers.base import Layer, Part, ReplacedForward, RootForward, part_from_samples
from adaclip.layers.compiled import plain_module, plain_names, renamed
from adaclip.layers.conv import ConvLayer, StandardizedConvLayer
from adaclip.layers.fallback import FallbackLayer
from adaclip.layers.frozen_norm import FrozenBatchNorm
from adaclip.layers.linear import EmbeddingLayer, LinearLayer
from adaclip.layers.norm import (
    FrozenNormInside,
    FrozenNormLayer,
    GroupNormLayer,
    InstanceNormLayer,
    LayerNormLayer,
)
from adaclip.layers.relu import ReLULayer
from adaclip.layers.tape import Tape, Use
from adaclip.layers.ws_conv import WSConv2d

__all__ = [
    "Layer",
    "Part",
    "ReplacedForward",
    "RootForward",
    "Tape",
    "Use",
    "build_layers",
    "build_reliefs",
    "part_from_samples",
    "plain_module",
    "plain_names",
    "renamed",
]

_ADAPTERS: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: LinearLayer,
    WSConv2d: StandardizedConvLayer,
    nn.Conv1d: ConvLayer,
    nn.Conv2d: ConvLayer,
    nn.Conv3d: ConvLayer,
    nn.GroupNorm: GroupNormLayer,
    nn.InstanceNorm1d: InstanceNormLayer,
    nn.InstanceNorm2d: InstanceNormLayer,
    nn.InstanceNorm3d: InstanceNormLayer,
    nn.LayerNorm: LayerNormLayer,
    nn.Embedding: EmbeddingLayer,
    # In evaluation mode, or `validate` would not have let them pass.
    nn.BatchNorm1d: FrozenNormLayer,
    nn.BatchNorm2d: FrozenNormLayer,
    nn.BatchNorm3d: FrozenNormLayer,
    nn.SyncBatchNorm: FrozenNormLayer,
    FrozenBatchNorm: FrozenNormLayer,
}


# What a kind's forward calls on itself, and a subclass or a patch could change.
_PARTS_OF_FORWARD = ("forward", "_conv_forward", "standardized_weight")


def adapter_for(module: nn.Module) -> type[Layer]:
    """The adapter of a module with parameters.

    A module whose forward is not its kind's, by a subclass or by a patch of the instance, is another layer.
    """
    if parametrize.is_parametrized(module) or (module._forward_pre_hooks and not module._parameters):
        return FallbackLayer
    for kind, adapter in _ADAPTERS.items():
        if isinstance(module, kind) and _computes_like(module, kind):
            if adapter is FrozenNormLayer:
                return adapter
            # A weight that is no longer a parameter is computed by someone (weight_norm).
            return FallbackLayer if module._parameters.get("weight") is None else adapter
    return FallbackLayer


def _computes_like(module: nn.Module, kind: type[nn.Module]) -> bool:
    for name in _PARTS_OF_FORWARD:
        if getattr(type(module), name, None) is not getattr(kind, name, None):
            return False
        patch = module.__dict__.get(name)
        # A copy of a private model holds its class's own forward, bound to itself.
        own = getattr(patch, "__func__", None) is getattr(kind, name, None)
        if patch is not None and not (own and patch.__self__ is module):
            return False
    return True


def _only_passes_on(module: nn.Module, owned: list[nn.Parameter]) -> bool:
    """Whether what is trained below the module is trained by its children's own forwards, as far as can be told.

    A module of the user's with frozen tokens or scales (a pretrained transformer's) leaves a trained head to the head.
    Some of torch's use their children's parameters without calling them.
    """
    if not owned or any(p.requires_grad for p in owned) or parametrize.is_parametrized(module):
        return False
    return bool(module._modules) and not type(module).__module__.startswith("torch.")


def build_layers(root: nn.Module, tape: Tape, backend: str) -> list[Layer]:
    """One adapter for every module with parameters of its own, outermost fallback first.

    A module that needs the fallback covers all parameters below it, so its children get no adapter. One whose own
    parameters are all frozen needs none: its children are looked at one by one.
    """
    layers: list[Layer] = []
    seen: set[nn.Module] = set()

    def cover(name: str, module: nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        owned = [p for p in module._parameters.values() if p is not None]
        if owned or parametrize.is_parametrized(module) or isinstance(module, _BatchNorm):
            kind = adapter_for(module)
            if kind is not FallbackLayer or not _only_passes_on(module, owned):
                layers.append(kind(name, module, tape, root, backend))
                if kind is FallbackLayer:
                    keep_frozen(name, module)
                    seen.update(module.modules())
                return
        for child_name, child in module.named_children():
            cover(f"{name}.{child_name}" if name else child_name, child)

    def keep_frozen(name: str, module: nn.Module) -> None:
        for inner, part in module.named_modules():
            if isinstance(part, _BatchNorm) and part not in seen:
                layers.append(FrozenNormInside(f"{name}.{inner}", part, tape, root, backend))

    cover("", root)
    slow = [
        f"{lay.name or 'the model'} ({type(lay.module).__name__})"
        for lay in layers
        if isinstance(lay, FallbackLayer) and lay.trainable()
    ]
    if slow:
        warnings.warn(
            "adaclip has no fast per-sample gradient for "
            + ", ".join(slow)
            + "; using the generic one (exact, slower).",
            stacklevel=4,
        )
    return layers


def build_reliefs(root: nn.Module, layers: list[Layer]) -> list[ReplacedForward]:
    """What stands in for modules without parameters: they learn nothing, but compile badly."""
    # What the generic layers run, they run as it is.
    left = {m for layer in layers if isinstance(layer, FallbackLayer) for m in layer.module.modules()}
    return [
        ReLULayer(m)
        for m in root.modules()
        if type(m) is nn.ReLU and "forward" not in m.__dict__ and m not in left
    ]
