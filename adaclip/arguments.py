"""What `PrivacyEngine.make_private` makes of its arguments, and their checks, before anything is changed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from adaclip import ops
from adaclip.accounting import Accountant
from adaclip.epochs import EpochLoader
from adaclip.errors import UnsupportedModuleError
from adaclip.groups import LabelGroups
from adaclip.layers import ReplacedForward
from adaclip.noise import NoiseSource
from adaclip.optimizer import DPOptimizer
from adaclip.processes import Processes
from adaclip.sampler import PoissonLoader
from adaclip.schedules import Schedule, check_schedule
from adaclip.shards import is_sharded
from adaclip.smoothing import SmoothedLoss
from adaclip.step_release import check_noise
from adaclip.validation import validate

__all__ = [
    "check_model",
    "check_optimizer",
    "check_options",
    "common",
    "make_loader",
    "make_source",
    "planned_loader",
    "unwrapped",
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


def unwrapped(module: nn.Module, processes: Processes) -> nn.Module:
    """The model itself: what DistributedDataParallel wraps, if it does.

    Raises ValueError for a wrapper that would add up gradients in a way of its own.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if not torch.distributed.is_available():
        return module
    # A module that nobody has imported, which takes long, has no instances.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
        raise ValueError(
            "module must be sharded by torch.distributed.fsdp.fully_shard, got FullyShardedDataParallel, which "
            "flattens the parameters of layers together"
        )
    if not isinstance(module, DistributedDataParallel):
        return module
    if module.static_graph or module.mixed_precision is not None:
        raise ValueError(
            "module must be wrapped without static_graph and mixed_precision, got a DistributedDataParallel with "
            f"static_graph={module.static_graph} and mixed_precision={module.mixed_precision}"
        )
    if torch.distributed.get_world_size(module.process_group) != processes.size:
        raise ValueError(
            "module must be wrapped for the processes that train it, got a DistributedDataParallel of "
            f"{torch.distributed.get_world_size(module.process_group)} in a group of {processes.size}"
        )
    return module.module


def check_model(module: nn.Module) -> None:
    if _of_opacus(module):
        raise TypeError(
            f"module must be the model itself, got Opacus's {type(module).__name__} around it: pass "
            "module.to_standard_module(), or make the model anew"
        )
    if any(isinstance(m.__dict__.get("forward"), ReplacedForward) for m in module.modules()):
        raise ValueError("module is trained by another engine already: detach it there first")
    problems = validate(module)
    if problems:
        raise UnsupportedModuleError("module cannot be trained privately as it is: " + "; ".join(problems))


def _of_opacus(thing: object) -> bool:
    # By name: it need not be installed.
    return any(kind.__module__.partition(".")[0] == "opacus" for kind in type(thing).__mro__)


def check_optimizer(
    module: nn.Module, optimizer: torch.optim.Optimizer, smoothing: SmoothedLoss | None
) -> None:
    if isinstance(optimizer, DPOptimizer):
        raise TypeError("optimizer must be an ordinary torch optimizer, got one that is private already")
    if _of_opacus(optimizer):
        raise TypeError(
            f"optimizer must be an ordinary torch optimizer, got Opacus's {type(optimizer).__name__} around one: pass "
            "optimizer.original_optimizer"
        )
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
    if any(is_sharded(p) for p in held):
        if type(optimizer).__module__.partition(".")[0] == "adaclip":
            raise ValueError(
                f"optimizer must be one of torch's for sharded parameters, got {type(optimizer).__name__}, which reads "
                "whole ones"
            )
        if smoothing is not None:
            raise ValueError(f"smoothing must be None for sharded parameters, got {smoothing}")


def make_loader(
    data_loader: DataLoader, poisson_sampling: bool, processes: Processes, **options: Any
) -> PoissonLoader | EpochLoader:
    """The private loader of an ordinary one; warns where it has no amplification by sampling."""
    if isinstance(data_loader, (PoissonLoader, EpochLoader)):
        raise TypeError("data_loader must be an ordinary DataLoader, got one that is private already")
    if poisson_sampling:
        loader = PoissonLoader.from_data_loader(
            data_loader, rank=processes.rank, world_size=processes.size, **options
        )
        if (loader.rank, loader.world_size) != (processes.rank, processes.size):
            raise ValueError(
                f"data_loader.sampler must be for this process, {processes.rank} of {processes.size}, got a "
                f"DistributedSampler for {loader.rank} of {loader.world_size}"
            )
        return loader
    if processes.size > 1:
        raise ValueError(
            f"poisson_sampling must be True for {processes.size} processes, got False: each would shuffle on its own, "
            "and an example could enter an epoch twice"
        )
    loader = EpochLoader(data_loader, **options)
    warnings.warn(
        "shuffled batches have no privacy amplification by sampling: every epoch costs as much as one "
        "step on the whole data set. poisson_sampling=True cures it",
        stacklevel=3,
    )
    return loader


def planned_loader(
    data_loader: DataLoader, poisson_sampling: bool, **options: Any
) -> PoissonLoader | EpochLoader:
    """A private loader that only says how data are sampled, whatever process this is."""
    if not poisson_sampling:
        return EpochLoader(data_loader, **options)
    return PoissonLoader.from_data_loader(data_loader, source=NoiseSource(), **options)


def common(
    module: nn.Module, optimizer: DPOptimizer, loader: PoissonLoader | EpochLoader, accountant: Accountant
) -> dict[str, Any]:
    """What must be the same in every process of a run: plain values by name."""
    trained = set(optimizer.trained())
    names = {p: name for name, p in module.named_parameters()}
    parts = {"clipping": optimizer.clipping, "groups": optimizer.groups, "smoothing": optimizer.smoothing}
    return {
        "module": [
            (name, tuple(p.shape), str(p.dtype), p in trained) for name, p in module.named_parameters()
        ],
        "optimizer": type(optimizer.original_optimizer).__name__,
        # Their order addresses the noise, and sums are added up in it.
        "optimizer.param_groups": [[names[p] for p in group["params"]] for group in optimizer.param_groups],
        "noise_multiplier": optimizer.base_noise_multiplier,
        "noise_schedule": None if optimizer.noise_schedule is None else optimizer.noise_schedule.state_dict(),
        "size of the data set": loader.dataset_size,
        "sample rate": loader.sample_rate,
        "max_batch_size": loader.max_batch_size,
        "views_per_sample": loader.views,
        "accountant": (accountant.name, accountant.ledger.state_dict()),
        **{name: None if part is None else part.config() for name, part in parts.items()},
    }


def make_source(key: bytes | int | torch.Generator | None, used: Iterable[NoiseSource]) -> NoiseSource:
    """A run's keystream; ValueError if one of `used` has its key: two releases of the same noise cancel."""
    source = NoiseSource(key)
    if any(source.same_key(other) for other in used):
        raise ValueError(
            "noise_generator must be a key that no earlier run of this engine released noise with: the same noise "
            "would be added again, and cancel in the difference of both runs' releases"
        )
    return source
