"""A small model, its data and a loop, as scripts for Opacus have them."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaclip.opacus import PrivacyEngine

KEY = bytes(range(32))
CLASSES = 3


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 4, CLASSES),
    )


def examples(n=50):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(n, 1, 8, 8, generator=g) * torch.logspace(-1, 1, n)[:, None, None, None]
    return TensorDataset(x, torch.arange(n) % CLASSES)


def loader(n=50, batch_size=8, **options):
    return DataLoader(examples(n), batch_size=batch_size, **options)


def private(engine=None, *, model=None, lr=0.1, data=None, **options):
    """(engine, model, optimizer, loader, …) of adaclip.opacus."""
    engine = engine or PrivacyEngine()
    model = model or network()
    options.setdefault("noise_multiplier", 1.0)
    options.setdefault("max_grad_norm", 1.0)
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        data_loader=loader() if data is None else data,
        **options,
    )
    return engine, *made


def train(model, optimizer, loader, criterion=None, steps=None):
    criterion = criterion or nn.CrossEntropyLoss()
    for i, (x, y) in enumerate(loader):
        if i == steps:
            return
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
