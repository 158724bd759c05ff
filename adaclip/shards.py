"""Parameters that FSDP2 (`torch.distributed.fsdp.fully_shard`) has cut up: each process holds some of their rows.

A layer sees whole weights in its forward and makes whole gradients of its own samples. They are added up over the
processes and cut like the parameter, at once and one after the other: no process ever holds all of them. Noise is
addressed by an element's place in the whole parameter, so a shard draws what that part of the whole would.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from adaclip.noise import NoiseSource
from adaclip.processes import Processes

__all__ = [
    "add_noise",
    "check_shards",
    "cut",
    "cut_like",
    "is_sharded",
    "local",
    "reshard",
    "shared_out",
    "whole",
    "whole_state",
]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is one that `fully_shard` made."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    # A module that nobody has imported, which takes long, has no instances.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds: memory of the tensor's own."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The values of all processes, detached. Every process asks at the same point."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()


def shared_out(p: Tensor, total: Tensor) -> Tensor:
    """Process by process `total`, of p's whole shape -> their sum, laid out as p is. Each process calls it."""
    from torch.distributed.tensor import DTensor, Partial

    partial = DTensor.from_local(total, p.device_mesh, [Partial()] * p.device_mesh.ndim)
    return partial.redistribute(placements=p.placements)


def cut(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every process has, laid out as `like` is; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    at = tensor.to(like.device)
    return distribute_tensor(at, like.device_mesh, list(like.placements), src_data_rank=None)


def whole_state(state: Any) -> Any:
    """A state dict with whole tensors in the place of sharded ones. Every process asks at the same point."""
    if isinstance(state, dict):
        return {k: whole_state(v) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole_state(v) for v in state)
    return whole(state) if isinstance(state, Tensor) and is_sharded(state) else state


def cut_like(state: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """An optimizer's whole state of parameter p, its tensors of p's shape laid out as p is."""
    if not is_sharded(p):
        return state
    return {
        k: cut(v, p) if isinstance(v, Tensor) and v.shape == p.shape and v.dim() > 0 else v
        for k, v in state.items()
    }


def add_noise(
    source: NoiseSource,
    p: Tensor,
    step: int | Tensor,
    stream: int,
    std: float | Tensor,
    first_chunk: int,
    backend: str = "auto",
) -> None:
    """Add the noise of p to this process's part of `p.grad`; arguments as in `NoiseSource.normal_`.

    The part gets the normals that it would get if p were whole.
    """
    from adaclip._core import CHUNK_NORMALS

    part = local(p.grad)
    skipped, lead = divmod(_first_element(p), CHUNK_NORMALS)
    noise = torch.empty(lead + part.numel(), dtype=torch.float32, device=part.device)
    source.normal_(noise, step, stream, 1.0, first_chunk + skipped, backend=backend)
    part.add_(noise[lead:].view(part.shape) * std)


def _first_element(p: Tensor) -> int:
    """Where this process's rows begin in the whole parameter, in elements."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    # Of a process without rows there is no offset. (Indexing p would send messages.)
    return offset[0] * (p.numel() // p.shape[0]) if p.dim() and 0 not in shape else 0


def reshard(module: nn.Module) -> None:
    """Put the shards back in the place of whole parameters, wherever a backward left these."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def check_shards(module: nn.Module, processes: Processes) -> bool:
    """Whether parameters of the module are sharded.

    Raises:
        ValueError: in a way that private sums do not follow: only some of the parameters, other dimensions than 0, a
          mesh of other processes than `processes`, parameters cast for the forward or kept on the CPU.
    """
    params = list(module.parameters())
    sharded = [p for p in params if is_sharded(p)]
    if not sharded:
        return False
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import Replicate, Shard

    if not isinstance(module, FSDPModule) or len(sharded) < len(params):
        raise ValueError(
            f"module must be sharded as a whole, got {len(sharded)} of {len(params)} parameters: call fully_shard on "
            "the module itself as well, after its parts"
        )
    for p in sharded:
        cuts = [place for place in p.placements if place != Replicate()]
        if any(place != Shard(0) for place in cuts) or len(cuts) > 1:
            raise ValueError(
                f"module must be sharded along dimension 0 by fully_shard alone, got {p.placements}"
            )
        if p.device_mesh.size() != processes.size:
            raise ValueError(
                f"module must be sharded over the processes that train it, got a mesh of {p.device_mesh.size()} in a "
                f"group of {processes.size}"
            )
        if local(p).device.type != p.device_mesh.device_type:
            raise ValueError(
                f"offload_policy must be left out, got parameters on {local(p).device} of a mesh of "
                f"{p.device_mesh.device_type}"
            )
    for part in module.modules():
        if isinstance(part, FSDPModule):
            cast = part._get_fsdp_state()._mp_policy.param_dtype
            if cast not in (None, torch.float32):
                raise ValueError(
                    f"mp_policy.param_dtype must be None, got {cast}: norms are of the gradients of the parameters "
                    "themselves; use torch.autocast"
                )
    return True
