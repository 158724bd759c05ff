"""What the tests of several processes run in each of them, and in one process alone to compare with."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from small_engine import KEY, data
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from adaclip import PrivacyEngine
from adaclip.layers import WSConv2d

# How a model is given to make_private.
KINDS = ("plain", "ddp", "fsdp2")


class Scale(nn.Module):
    """A module without a fast path."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 4))

    def forward(self, x):
        return x * self.scale[:, None, None]


class Net(nn.Module):
    """Every kind of layer that treats shards differently; one used twice, one with a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.first = WSConv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.scale = Scale()
        self.second = nn.Conv2d(4, 5, 3, stride=2)
        self.twice = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, x):
        x = self.scale(torch.relu(self.norm(self.first(x))))
        x = torch.relu(self.second(x)).amax((2, 3))
        return self.head(torch.relu(self.twice(torch.tanh(self.twice(x)))))


def wrapped(model: nn.Module, kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for part in (model.first, model.second, model.twice):
            fully_shard(part)
        return fully_shard(model)
    return model


def made(kind: str = "plain", *, n=40, batch_size=10, lr=0.5, momentum=0.9, sigma=1.0, **options: Any):
    """(engine, model, optimizer, loader) of this process."""
    torch.manual_seed(0)
    model = Net()
    if kind == "plain" and dist.is_initialized() and dist.get_rank() > 0:
        # Other processes start from the first one's parameters, whatever theirs are.
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
    model = wrapped(model, kind)
    x, _ = data(n)
    x = options.pop("images", x)
    labels = torch.arange(n) % 3
    engine = PrivacyEngine()
    held = [p for p in model.parameters() if p.requires_grad]
    maker = options.pop("optimizer", lambda p: torch.optim.SGD(p, lr=lr, momentum=momentum))
    options.setdefault("noise_generator", KEY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the generic layer
        module, optimizer, loader = engine.make_private(
            module=model,
            optimizer=maker(held),
            data_loader=DataLoader(TensorDataset(x, labels), batch_size=batch_size),
            noise_multiplier=sigma,
            **options,
        )
    return engine, module, optimizer, loader


def go_on(module: nn.Module, optimizer: Any, loader: Any, steps: int) -> list[int]:
    """That many more logical steps; returns how many samples this process had in each physical batch."""
    rows, end = [], optimizer.releases + steps
    while optimizer.releases < end:
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
            rows.append(loader.current.rows)
            if optimizer.releases == end:
                break
    return rows


def numbers(tensors: Any) -> torch.Tensor:
    """Everything in one vector, whole where it is sharded."""
    from adaclip.shards import whole

    return torch.cat([whole(t).flatten().double() for t in tensors])


def trained(kind: str, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """A training run's results: parameters, optimizer state, thresholds, sizes and what was booked."""
    engine, module, optimizer, loader = made(kind, **options)
    rows = go_on(module, optimizer, loader, steps)
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    return {
        "parameters": numbers(module.parameters()),
        "state": numbers(state) if state else None,
        "thresholds": optimizer.clipping.thresholds,
        "selected": None if optimizer.groups is None else optimizer.groups.released["ratios"],
        "rows": rows,
        "ledger": engine.accountant.ledger.state_dict(),
        "non_finite": optimizer.non_finite_samples,
    }
