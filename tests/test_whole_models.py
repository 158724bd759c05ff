"""Whole networks: against the float64 per-sample loop, and against Opacus where it supports the layers."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaclip.layers.ws_conv import WSConv2d
from adaclip.models import build
from adaclip.testing import clipped_sum, private_step, sample_grads

CASES = {
    "vgg11": {"in_channels": 3, "image_size": 32},
    "vgg11 28x28x1, classic head": {"name": "vgg11", "in_channels": 1, "image_size": 28, "head": "fc"},
    "vgg16": {"in_channels": 3, "image_size": 32},
    "vgg13 standardized": {"name": "vgg13", "in_channels": 3, "weight_standardization": True},
    "vgg-mini": {"in_channels": 1, "image_size": 28},
    "vgg-small": {"in_channels": 3, "image_size": 32, "activation": "tanh"},
}


def distance(found, truth):
    """Norm of the difference over the norm of the truth, all parameters together."""
    a = torch.cat([found[n].flatten().double() for n in truth])
    b = torch.cat([t.flatten().double() for t in truth.values()])
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("case", CASES)
def test_clipped_sum(case):
    clip = 0.5
    options = dict(CASES[case])
    model = build(options.pop("name", case), num_classes=10, **options)
    size = options.get("image_size", 32)
    x, y = torch.randn(3, options["in_channels"], size, size), torch.tensor([1, 7, 3])
    truth = clipped_sum(sample_grads(model, x, y, F.cross_entropy), clip)
    found, _ = private_step(model, x, y, F.cross_entropy, max_grad_norm=clip)
    # Norms of standardized convolutions are upper bounds, for the worst rounding of their outputs.
    standardized = any(isinstance(m, WSConv2d) for m in model.modules())
    assert distance(found, truth) < (1e-4 if standardized else 1e-5)


def opacus_sum(model, x, y, clip):
    opacus = pytest.importorskip("opacus")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, optimizer, _ = opacus.PrivacyEngine(accountant="rdp").make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
            data_loader=DataLoader(TensorDataset(x, y), batch_size=len(x)),
            noise_multiplier=0.0,
            max_grad_norm=clip,
            poisson_sampling=False,
        )
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return {n.removeprefix("_module."): p.grad.double() * len(x) for n, p in model.named_parameters()}


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.conv = nn.Conv1d(12, 8, 3, padding=1, dilation=1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 10)

    def forward(self, ids):
        h = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.head(torch.tanh(self.norm(h))).mean(1)


def networks():
    def block(conv, channels):
        return nn.Sequential(
            conv, nn.InstanceNorm2d(channels, affine=True), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)
        )

    yield "vgg11", build("vgg11", num_classes=10), torch.randn(4, 3, 32, 32)
    yield "strided", block(nn.Conv2d(3, 6, 3, stride=2, padding=1), 6), torch.randn(4, 3, 9, 9)
    yield "dilated", block(nn.Conv2d(3, 6, 3, dilation=2), 6), torch.randn(4, 3, 9, 9)
    yield "sequence", Sequence(), torch.randint(0, 20, (4, 7))
    yield (
        "volumes",
        nn.Sequential(nn.Conv3d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.LazyLinear(10)),
        torch.randn(4, 2, 5, 5, 5),
    )


@pytest.mark.parametrize("case", range(5))
def test_against_opacus(case):
    _, model, x = list(networks())[case]
    model(x)  # gives lazy layers their shapes
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    y = torch.tensor([1, 7, 3, 3])
    theirs = opacus_sum(copy.deepcopy(model), x, y, 0.5)
    truth = clipped_sum(sample_grads(model, x, y, F.cross_entropy), 0.5)
    found, _ = private_step(model, x, y, F.cross_entropy, max_grad_norm=0.5)
    assert distance(found, truth) < 1e-5
    # Opacus divides by (norm + 1e-6), hence not closer.
    assert distance(found, theirs) < 1e-4
