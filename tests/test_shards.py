"""What fully_shard may and may not do to a model that is trained privately."""

import math
import warnings

import pytest
import torch
from shared_training import Net, made, wrapped
from small_engine import data
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, TensorDataset
from two_processes import run

from adaclip import PrivacyEngine
from adaclip.noise import STREAM_GRADIENT, NoiseSource
from adaclip.shards import add_noise, cut, is_sharded, local, shared_out, whole
from adaclip.smoothing import DPAdamBC, SmoothedLoss

pytestmark = pytest.mark.usefixtures("one_thread")


def _tried(model, optimizer=torch.optim.SGD, **options):
    x, _ = data(40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            PrivacyEngine().make_private(
                module=model,
                optimizer=optimizer([p for p in model.parameters() if p.requires_grad], lr=0.1),
                data_loader=DataLoader(TensorDataset(x), batch_size=5),
                noise_multiplier=1.0,
                **options,
            )
        except (ValueError, TypeError) as error:
            return str(error)
    return "accepted"


def _refusals():
    # Of torch's own FSDP: a mesh of one process each, where the group has two.
    single = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))["b"]
    partly = Net()
    fully_shard(partly.head)
    half = Net()
    fully_shard(half, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    other = nn.Linear(4, 4)
    fully_shard(other, shard_placement_fn=lambda p: torch.distributed.tensor.Shard(p.dim() - 1))
    return {
        "parts": _tried(partly),
        "dtype": _tried(half),
        "columns": _tried(other),
        "mesh": _tried(fully_shard(nn.Linear(4, 4), mesh=single)),
        "first FSDP": _tried(FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))),
        "optimizer": _tried(wrapped(Net(), "fsdp2"), DPAdamBC),
        "smoothing": _tried(wrapped(Net(), "fsdp2"), smoothing=SmoothedLoss(0.1, signal="always")),
        "good": _tried(wrapped(Net(), "fsdp2")),
    }


def test_what_is_refused():
    for found in run(_refusals):
        assert found["parts"].startswith("module must be sharded as a whole, got 2 of 11 parameters")
        assert found["dtype"].startswith("mp_policy.param_dtype must be None, got torch.bfloat16")
        assert found["columns"].startswith("module must be sharded along dimension 0 by fully_shard alone")
        assert found["mesh"].endswith("got a mesh of 1 in a group of 2")
        assert "got FullyShardedDataParallel" in found["first FSDP"]
        assert found["optimizer"].startswith(
            "optimizer must be one of torch's for sharded parameters, got DPA"
        )
        assert found["smoothing"].startswith("smoothing must be None for sharded parameters")
        assert found["good"] == "accepted"


def _pieces(shape):
    """The noise of a parameter of that shape, the sum of gradients, and both whole again."""
    rank = torch.distributed.get_rank()
    module = nn.Module()
    module.p = nn.Parameter(torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape))
    fully_shard(module)
    p = module.p
    assert is_sharded(p)
    assert torch.equal(whole(cut(whole(p), p)), whole(p))
    summed = whole(shared_out(p, torch.full(shape, 1.0 + rank)))
    p.grad = torch.zeros_like(p)
    add_noise(NoiseSource(7), p, 3, STREAM_GRADIENT, 2.0, 5)
    return summed, whole(p.grad), local(p).numel()


SHAPES = [(1, 3), (2, 161), (5, 100), (64,), (7, 5, 3, 3)]


def _all_pieces():
    return [_pieces(shape) for shape in SHAPES]


def test_a_shard_draws_what_the_whole_would():
    for shape, found in zip(SHAPES, zip(*run(_all_pieces, world=3), strict=True), strict=True):
        noise = NoiseSource(7).normal_(torch.empty(shape), 3, STREAM_GRADIENT, 2.0, 5)
        for summed, made_noise, _ in found:
            assert torch.equal(summed, torch.full(shape, 6.0))
            torch.testing.assert_close(made_noise, noise, rtol=1e-6, atol=0)
        assert sum(numel for _, _, numel in found) == math.prod(shape)


def _guarded():
    """Messages of what is noticed of sharded gradients, and whether unsharded weights are in the way."""
    messages = []
    _, module, optimizer, loader = made("fsdp2")
    module.set_reshard_after_backward(False)
    x, y = next(iter(loader))
    nn.functional.cross_entropy(module(x), y).backward()
    messages.append(all(p.grad is not None for p in optimizer.trained()))
    module.head.weight.grad.mul_(2)
    try:
        optimizer.step()
    except RuntimeError as error:
        messages.append(str(error))
    return messages


def test_changed_gradients_of_shards_are_noticed():
    for complete, message in run(_guarded):
        assert complete
        assert message.startswith("the gradient of parameter head.weight was changed")
