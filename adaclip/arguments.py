"""What `PrivacyEngine.make_private` makes of its arguments, and their checks, before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from adaclip import ops
from adaclip.epochs import EpochLoader
from adaclip.errors import UnsupportedModuleError
from adaclip.groups import LabelGroups
from adaclip.layers import ReplacedForward
from adaclip.noise import NoiseSource
from adaclip.optimizer import DPOptimizer
from adaclip.sampler import PoissonLoader
from adaclip.schedules import Schedule, check_schedule
from adaclip.step_release import check_noise
from adaclip.validation import validate

__all__ = [
    "check_model",
    "check_optimizer",
    "check_options",
    "check_single_process",
    "make_loader",
    "make_source",
]


def check_options(
    *,
    noise_multiplier: float,
    noise_schedule: Schedule | None,
    poisson_sampling: bool,
    groups: LabelGroups | None,
    labels: Callable | None,
    backend: str,
    loss_reduction: str,
) -> None:
    """The options that no other part of the engine checks."""
    check_noise(noise_multiplier)
    ops.check_backend(backend)
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
    if check_schedule(noise_schedule, "noise_schedule") is not None and not poisson_sampling:
        raise ValueError(
            "noise_schedule must be None for shuffled batches, whose noise may not fall within an epoch, "
            f"got {noise_schedule}"
        )
    if groups is not None and not isinstance(groups, LabelGroups):
        raise TypeError(f"groups must be an adaclip.groups.LabelGroups or None, got {type(groups).__name__}")
    if labels is not None and groups is None:
        raise ValueError(f"labels must be None without groups, got {labels!r}")
    if labels is not None and not callable(labels):
        raise TypeError(f"labels must be callable or None, got {type(labels).__name__}")


def check_single_process() -> None:
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            f"make_private trains in one process, but torch.distributed has {dist.get_world_size()}: each "
            "would add its own noise and none would see the others' gradients"
        )


def check_model(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if any(isinstance(m.__dict__.get("forward"), ReplacedForward) for m in module.modules()):
        raise ValueError("module is trained by another engine already: detach it there first")
    problems = validate(module)
    if problems:
        raise UnsupportedModuleError("module cannot be trained privately as it is: " + "; ".join(problems))


def check_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if isinstance(optimizer, DPOptimizer):
        raise TypeError("optimizer must be an ordinary torch optimizer, got one that is private already")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    wrapped = [optimizer.__dict__.get(name) for name in ("optimizer", "_optimizer")]
    if any(isinstance(inner, torch.optim.Optimizer) for inner in wrapped):
        raise TypeError(
            f"optimizer must be the plain one, got a {type(optimizer).__name__} around it: give make_private the plain "
            "optimizer, and the trainer or accelerator what make_private returns"
        )
    if isinstance(optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam)):
        raise ValueError(
            f"optimizer must be a first-order one with dense gradients, got {type(optimizer).__name__}: "
            "it would use a private batch more than once"
        )
    known = set(module.parameters())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = sum(p not in known for p in held)
    if foreign:
        raise ValueError(f"optimizer must hold parameters of module only, got {foreign} that are not")
    if not any(p.requires_grad for p in held):
        raise ValueError("optimizer must hold at least one parameter that requires gradients")


def make_loader(
    data_loader: DataLoader, poisson_sampling: bool, **options: Any
) -> PoissonLoader | EpochLoader:
    """The private loader of an ordinary one; warns where it has no amplification by sampling."""
    if isinstance(data_loader, (PoissonLoader, EpochLoader)):
        raise TypeError("data_loader must be an ordinary DataLoader, got one that is private already")
    if poisson_sampling:
        return PoissonLoader.from_data_loader(data_loader, **options)
    loader = EpochLoader(data_loader, **options)
    warnings.warn(
        "shuffled batches have no privacy amplification by sampling: every epoch costs as much as one "
        "step on the whole data set. poisson_sampling=True cures it",
        stacklevel=3,
    )
    return loader


def make_source(key: bytes | int | torch.Generator | None, used: Iterable[NoiseSource]) -> NoiseSource:
    """A run's keystream; ValueError if one of `used` has its key: two releases of the same noise cancel."""
    source = NoiseSource(key)
    if any(source.same_key(other) for other in used):
        raise ValueError(
            "noise_generator must be a key that no earlier run of this engine released noise with: the same noise "
            "would be added again, and cancel in the difference of both runs' releases"
        )
    return source
