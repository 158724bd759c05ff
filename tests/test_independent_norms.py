"""One sample's norm does not depend on the others: neither on their values nor on how many there are.

The number of samples in a batch is private, and so is every value. A norm that followed them would let one
sample move another's clipping factor, or its side of a threshold that is counted.
"""

import math

import pytest
import torch
from torch import nn

from adaclip import ops, reference
from adaclip.layers import Tape, Use, build_layers
from adaclip.layers.ws_conv import WSConv2d
from adaclip.testing import private_step, relative_error, square_loss


def canceling(batch, cin, cout, *size):
    """Input and output gradient whose products cancel: sqrt(M) > 256 norms, the severe branch of the bound."""
    x = torch.ones(batch, cin, *size) + 1e-5 * torch.randn(batch, cin, *size)
    g = torch.randn(batch, cout, math.prod(size))
    g = g - g.mean(2, keepdim=True)
    return x, g.reshape(batch, cout, *size)


def conv_case(conv):
    x, g = canceling(9, conv.in_channels, conv.out_channels, 3, 3)
    return conv, [x, g]


def standardized_case():
    conv = WSConv2d(16, 16, 1)
    x, g = canceling(9, 16, 16, 4, 4)
    return conv, [x, g, torch.zeros(9, 16)]


def linear_case():
    x, g = canceling(9, 40, 40, 6)
    return nn.Linear(40, 40), [x.mT.contiguous(), g.mT.contiguous()]


def embedding_case():
    g = torch.randn(9, 6, 4)
    g = torch.cat([g, -g + 1e-5 * torch.randn_like(g)], 1)
    return nn.Embedding(3, 4), [torch.zeros(9, 12, dtype=torch.int64), g]


@pytest.mark.parametrize(
    "case",
    [
        lambda: conv_case(nn.Conv2d(64, 64, 1)),
        lambda: conv_case(nn.Conv2d(512, 8, 1)),
        standardized_case,
        linear_case,
        embedding_case,
    ],
    ids=["conv", "few channels", "standardized", "linear", "embedding"],
)
def test_the_bound_on_rounding_is_that_of_the_sample_alone(case):
    torch.manual_seed(0)
    module, tensors = case()
    (layer,) = build_layers(nn.Sequential(module), Tape(lambda: None), "auto")
    wanted = set(module.parameters())

    def norms(rows):
        return layer.measure(Use([t[:rows] for t in tensors], 1), wanted).sqnorms

    whole = norms(9)
    assert bool((whole > 0).all())
    for rows in (1, 2, 5):
        assert torch.equal(norms(rows), whole[:rows])


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.standardized = WSConv2d(16, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.mix = nn.Linear(16, 16)
        self.layer_norm = nn.LayerNorm(16)
        self.slope = nn.PReLU()
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.norm(self.standardized(torch.tanh(self.conv(x)))).flatten(2).mT
        return self.head(self.slope(self.layer_norm(self.mix(x))).mean(1))


@pytest.mark.filterwarnings("ignore:adaclip has no fast")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("value", [0.0, 1.0, -1e4, 1e30, math.nan])
def test_other_rows_of_a_batch_do_not_enter_a_norm(value, backend):
    torch.manual_seed(0)
    model, x, y = Everything(), torch.randn(8, 3, 6, 6), torch.randn(8, 4)
    _, norms = private_step(model, x, y, square_loss, max_grad_norm=1.0, backend=backend)
    for changed in ([7], [1, 4, 6]):
        others = [b for b in range(8) if b not in changed]
        moved = x.clone()
        moved[changed] = value
        _, seen = private_step(model, moved, y, square_loss, max_grad_norm=1.0, backend=backend)
        assert torch.equal(seen[others], norms[others])
        assert not torch.equal(seen[changed], norms[changed])


def test_long_sums_are_made_of_short_ones(monkeypatch):
    torch.manual_seed(0)
    a, h, factors = torch.randn(7, 5, 6), torch.randn(7, 5, 4), torch.rand(7)
    factors[2] = 0
    truth = reference.linear_weighted_grad(a.double(), h.double(), factors)
    assert reference.linear_roundings(5) == reference.linear_roundings(500) < reference.linear_roundings(5000)
    for longest in (1, 10, 33, 1024):
        monkeypatch.setattr(reference, "_LONGEST_SUM", longest)
        ours = ops.linear_weighted_grad(a, h, factors)
        assert ours.dtype == torch.float32
        assert relative_error(ours, truth) < 1e-6
