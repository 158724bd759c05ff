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


KINDS = {
    "conv1d": (lambda: nn.Conv1d(3, 6, 3, stride=2, padding=1), (3, 12)),
    "conv2d, grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding="same"), (4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 4, 4, 4)),
    "standardized": (lambda: WSConv2d(4, 6, 3, padding=1), (4, 6, 6)),
    "standardized, many positions": (lambda: WSConv2d(4, 6, 3, padding=1, bias=False), (4, 24, 24)),
    "linear": (lambda: nn.Linear(20, 30), (20,)),
    "linear, sequence": (lambda: nn.Linear(6, 5), (40, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 8), (8, 5, 5)),
    "instance norm": (lambda: nn.InstanceNorm2d(8, affine=True), (8, 5, 5)),
    "layer norm": (lambda: nn.LayerNorm(40), (3, 40)),
    "fallback": (lambda: nn.ConvTranspose2d(3, 4, 3), (3, 6, 6)),
}


def under(dtype, module, checkpointed=False):
    class Under(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, x):
            with torch.autocast("cpu", dtype=dtype):
                if checkpointed:
                    out = torch.utils.checkpoint.checkpoint(self.module, x, use_reentrant=False)
                else:
                    out = self.module(x)
            return out.float().flatten(1)

    return Under()


@pytest.mark.filterwarnings("ignore:adaclip has no fast")
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_sample_adds_under_autocast_keeps_its_bound(kind, dtype, checkpointed):
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    model = under(dtype, make(), checkpointed)
    for seed in range(3):
        x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
        y = torch.randn_like(model(x))
        _, norms = private_step(model, x, y, square_loss, max_grad_norm=1.0)
        for share in (151.5 / 256, 213.5 / 256):
            bound = float(norms) * share
            found, _ = private_step(model, x, y, square_loss, max_grad_norm=bound)
            total = float(torch.cat([t.double().flatten() for t in found.values()]).norm())
            assert total <= bound * LIMIT
            # Nothing is clipped much harder than it must be.
            assert total >= bound * 0.98


@pytest.mark.filterwarnings("ignore:adaclip has no fast")
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_that_overflows_float16_adds_nothing(kind):
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    model = under(torch.float16, make())
    x = torch.randn(3, *shape)
    y = torch.randn_like(model(x))
    wild = y.clone()
    # Its gradient is beyond float16 at the layer's output.
    wild[1] *= 1e8
    found, norms = private_step(model, x, wild, square_loss, max_grad_norm=0.1)
    rest, _ = private_step(model, x[[0, 2]], y[[0, 2]], square_loss, max_grad_norm=0.1)
    if bool(norms[1].isfinite()):
        # Normalizations are float32 under autocast: nothing overflows, and the sample is clipped like others.
        assert "norm" in kind
        return
    assert norms[[0, 2]].isfinite().all()
    for name, total in found.items():
        assert total.isfinite().all()
        # A mean over another number of rows is rounded to other float16 values.
        assert float((total - rest[name]).norm()) <= 5e-3 * float(rest[name].norm())
