"""One logical batch through the real engine, stopped before the noise: what is about to be released."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaclip import PrivacyEngine
from adaclip.clipping import (
    AdaptiveClipping,
    AutomaticClipping,
    DCSGDClipping,
    FlatClipping,
    PerLayerClipping,
    PSACClipping,
)

KEY = bytes(range(32))
LAYERS = 2

# sigma_b, sigma_h: what a batch of a few rows needs, where q N / 20 would be too little noise to split.
STRATEGIES = {
    "flat": lambda c: FlatClipping(c),
    "per_layer": lambda c: PerLayerClipping(c),
    "per_layer_adaptive": lambda c: PerLayerClipping(c, quantile=0.5, sigma_b=20.0),
    "adaptive": lambda c: AdaptiveClipping(c, sigma_b=20.0),
    "automatic": lambda c: AutomaticClipping(c),
    "psac": lambda c: PSACClipping(c),
    "dc_sgd": lambda c: DCSGDClipping(c, sigma_h=20.0),
    "dc_sgd_error": lambda c: DCSGDClipping(c, criterion="error", sigma_h=20.0),
}


class Probe(nn.Module):
    """Linear layers on slices of the input, summed: the gradient of an output is its input row."""

    def __init__(self, width):
        super().__init__()
        self.sizes = [len(part) for part in np.array_split(np.arange(width), LAYERS)]
        self.layers = nn.ModuleList(nn.Linear(size, 1, bias=False) for size in self.sizes)

    def forward(self, x):
        parts = x.split(self.sizes, dim=1)
        return sum(layer(part) for layer, part in zip(self.layers, parts, strict=True))


@dataclass
class OneStep:
    """gradient float64 [d]: p.grad times q N, the clipped sum; statistics float64 [S]; rows: what the model saw."""

    gradient: torch.Tensor
    statistics: torch.Tensor
    rows: torch.Tensor
    optimizer: object
    norm: float


def private(rows, *, sample_rate=1.0, groups=None, noise_multiplier=1.0, **options):
    """(model, optimizer, loader) over a data set of gradients float32 [N, d], example i of label i % 3."""
    labels = torch.arange(len(rows)) % 3
    options.setdefault("noise_generator", KEY)
    model = Probe(rows.shape[1])
    batch = max(1, round(sample_rate * len(rows)))
    return PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(rows, labels), batch_size=batch),
        noise_multiplier=noise_multiplier,
        max_grad_norm=None,
        groups=groups,
        **options,
    )


def backward(model, optimizer, loader):
    """One logical batch, up to its step(), which is left to the caller; -> the rows that the model saw."""
    seen = []
    for batch in loader:
        optimizer.zero_grad()
        model(batch[0]).mean().backward()
        seen.append(batch[0])
        if loader.current.last:
            break
        optimizer.step()
    return torch.cat(seen)


def one_step(rows, clipping, **options):
    """The whole data set as one logical batch (q = 1), before its noise."""
    model, optimizer, loader = private(rows, clipping=clipping, **options)
    seen = backward(model, optimizer, loader)
    grads = [torch.zeros(p.shape) if p.grad is None else p.grad for p in model.parameters()]
    gradient = torch.cat([g.flatten() for g in grads]).double() * optimizer.expected_batch_size
    statistics = optimizer._sum.statistics.sums.clone()
    return OneStep(gradient, statistics, seen, optimizer, optimizer.max_grad_norm)


def formula(gradients, name, c):
    """The clipped sum, float64 [d], of gradients float64 [N, d], one sample at a time."""
    total = torch.zeros(gradients.shape[1], dtype=torch.float64)
    sizes = [len(part) for part in np.array_split(np.arange(gradients.shape[1]), LAYERS)]
    for row in gradients.double():
        if not row.isfinite().all():
            continue
        if name.startswith("per_layer"):
            parts = row.split(sizes)
            limit = c / math.sqrt(LAYERS)
            total += torch.cat([part * min(1.0, limit / max(part.norm().item(), 1e-300)) for part in parts])
            continue
        n = row.norm().item()
        factor = {"automatic": c / (n + 0.01), "psac": c / (n + 0.1 / (n + 0.1))}.get(
            name, min(1.0, c / max(n, 1e-300))
        )
        total += row * factor
    return total
