"""Layers under autocast and with 16-bit parameters: nothing is rounded before it is bounded."""

import copy

import pytest
import torch
from layer_checks import SAME, check
from torch import nn

from adaclip import ops, reference
from adaclip.clipping import clip_factors
from adaclip.layers.ws_conv import WSConv2d
from adaclip.testing import private_step, relative_error, square_loss

LIMIT = 1 + 2.0**-20


class Mixed(nn.Module):
    """Every adapted layer kind, a sequence among them."""

    def __init__(self, conv=nn.Conv2d):
        super().__init__()
        self.conv = conv(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.next = nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect")
        self.layer_norm = nn.LayerNorm(6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.next(torch.tanh(self.norm(self.conv(x))))
        x = self.mix(self.layer_norm(x.flatten(2).mT))
        return self.head(torch.tanh(x).mean(1)).float()


class Autocast(nn.Module):
    """Runs another model under bfloat16 autocast; in float64, where it is the truth, as it is."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype != torch.float64):
            return self.model(x).to(x.dtype)


@pytest.mark.parametrize("conv", [nn.Conv2d, WSConv2d])
@pytest.mark.parametrize("backend", ["auto", "cpp", "reference"])
def test_autocast(backend, conv):
    model = Autocast(Mixed(conv))
    found = check(model, torch.randn(6, 3, 8, 8), outputs=(6, 4), tolerance=2e-2, backend=backend)
    assert {t.dtype for t in found.values()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:adaclip has no fast")
def test_autocast_in_the_fallback():
    model = Autocast(
        nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(196, 5), nn.RMSNorm(5))
    )
    check(model, torch.randn(4, 3, 5, 5), outputs=(4, 5), tolerance=2e-2)


def test_layers_under_autocast_have_torchs_dtypes():
    seen = {}

    class Watched(Mixed):
        def __init__(self):
            super().__init__()
            for name in ("conv", "next", "mix", "head"):
                layer = self.get_submodule(name)
                layer.register_forward_hook(lambda m, _, out, name=name: seen.update({name: out.dtype}))

    x = torch.randn(4, 3, 8, 8)
    private_step(Autocast(Watched()), x, torch.randn(4, 4), square_loss, max_grad_norm=1.0)
    assert len(seen) == 4
    assert set(seen.values()) == {torch.bfloat16}


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_backward_inside_autocast_keeps_the_bound(backend):
    model, x, y = Mixed(), torch.randn(1, 3, 8, 8), torch.randn(1, 4)
    for bound in (0.1, 0.077, 0.051):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, _ = private_step(model, x, y, square_loss, max_grad_norm=bound, backend=backend)
        norm = float(torch.cat([t.double().flatten() for t in found.values()]).norm())
        assert bound * (1 - 1e-5) <= norm <= bound * LIMIT


def rows_of(dtype, *shape):
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_contributions_of_16_bit_gradients_keep_their_bound(backend, inside, dtype):
    """What a sample adds to the sum, before the sum is rounded to the parameter's dtype."""
    x, g = rows_of(dtype, 4, 8, 6, 6), rows_of(dtype, 4, 8, 6, 6)
    a, h, ids = rows_of(dtype, 4, 5, 9), rows_of(dtype, 4, 5, 7), torch.randint(0, 3, (4, 5))
    weight = torch.randn(8, 8, 3, 3).to(dtype)
    exact = {
        "conv": reference.conv_sample_grads(x.double(), g.double(), *SAME.values()),
        "kept": reference.conv_sample_grads(x.double(), g.double(), *SAME.values()),
        "linear": reference.linear_sample_grads(a.double(), h.double()),
        "embedding": reference.embedding_sample_grads(ids, h.double(), 3, None),
        "rows": a.double(),
    }
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
        kept = ops.conv_sample_norms(x, g, **SAME, keep=True, backend=backend).kept
        for b in range(4):
            for name, truth in exact.items():
                norms = reference.row_sqnorms(truth).sqrt()
                bound = float(norms.median()) * 0.7
                factors = clip_factors(norms, bound).float()
                factors[torch.arange(4) != b] = 0
                made = {
                    "conv": lambda f: ops.conv_weighted_grad(x, g, f, weight, **SAME, backend=backend),
                    "kept": lambda f: ops.weighted_sum(kept, f, backend=backend),
                    "linear": lambda f: ops.linear_weighted_grad(a, h, f),
                    "embedding": lambda f: reference.embedding_weighted_grad(ids, h, f, 3),
                    "rows": lambda f: ops.weighted_sum(a, f, backend=backend),
                }[name](factors)
                assert made.dtype == torch.float32
                assert float(made.double().norm()) <= bound * LIMIT
                assert relative_error(made, float(factors[b]) * truth[b]) < 1e-5


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(20, 30), (20,)),
        (nn.Linear(20, 30), (7, 20)),
        (nn.Conv2d(8, 8, 3, padding=1), (8, 6, 6)),
        (WSConv2d(8, 8, 3, padding=1), (8, 6, 6)),
        (nn.GroupNorm(2, 800), (800, 5)),
        (nn.LayerNorm(400), (3, 400)),
        (nn.Embedding(9, 400), (4,)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
def test_16_bit_models(module, shape, backend):
    model = nn.Sequential(copy.deepcopy(module)).bfloat16()
    x = (
        torch.randint(0, 9, (1, *shape))
        if isinstance(module, nn.Embedding)
        else rows_of(model[0].weight.dtype, 1, *shape)
    )
    y = torch.randn_like(model(x))
    _, norms = private_step(model, x, y, square_loss, max_grad_norm=1.0, backend=backend)
    # Halfway between two bfloat16 numbers: a factor rounded to 8 bits would be off by at least 2.3e-3.
    for share in (151.5 / 256, 179.5 / 256, 213.5 / 256):
        bound = float(norms) * share
        found, seen = private_step(model, x, y, square_loss, max_grad_norm=bound, backend=backend)
        assert {t.dtype for t in found.values()} == {torch.float32}
        assert torch.equal(seen, norms)
        total = torch.cat([t.double().flatten() for t in found.values()]).norm()
        assert bound * (1 - 1e-5) <= float(total) <= bound * LIMIT
