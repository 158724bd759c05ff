"""A small model under a private engine, for the engine's tests."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaclip import PrivacyEngine
from adaclip.testing import square_loss

KEY = bytes(range(32))
CLASSES = 3


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
    )


def data(n=40):
    g = torch.Generator().manual_seed(3)
    return torch.randn(n, 1, 6, 6, generator=g), torch.randn(n, 3, generator=g)


def private(
    model=None,
    *,
    n=40,
    batch_size=10,
    sigma=1.0,
    lr=0.1,
    optimizer=None,
    adjacency=None,
    classes=False,
    **options,
):
    """(engine, model, optimizer, loader); targets are vectors, or labels with `classes`."""
    model = small_model() if model is None else model
    x, y = data(n)
    engine = PrivacyEngine(adjacency=adjacency)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr)
    options.setdefault("noise_generator", KEY)
    made = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(
            TensorDataset(x, torch.arange(n) % CLASSES if classes else y), batch_size=batch_size
        ),
        noise_multiplier=sigma,
        **options,
    )
    return engine, *made


def train(model, optimizer, loader, epochs=1):
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            square_loss(model(x), y).backward()
            optimizer.step()


def labeled(model=None, **options):
    return private(model, **{"n": 60, "batch_size": 20, "classes": True, **options})


def train_labeled(model, optimizer, loader, steps):
    """So many logical steps, over as many epochs as they take."""
    done = optimizer.releases + steps
    while optimizer.releases < done:
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if optimizer.releases == done:
                return


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def batch_of(loader):
    return next(iter(loader))
