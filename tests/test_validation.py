"""validate finds what forbids per-sample gradients; fix repairs what settings can repair, in a copy."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from adaclip.models import NAMES, build
from adaclip.validation import fix, validate


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(x + self.bn(self.conv(x)))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU6(inplace=True),
        nn.Sequential(Residual(), nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
        nn.Flatten(),
        nn.Linear(8 * 36, 12),
        nn.BatchNorm1d(12, affine=False),
        nn.Dropout(0.5, inplace=True),
        nn.Linear(12, 4),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head", ["pool", "fc"])
def test_own_models_need_nothing(name, head):
    assert validate(build(name, num_classes=3, head=head, width=8)) == []


BATCH_NORMS = [
    nn.BatchNorm1d(8),
    nn.BatchNorm2d(8),
    nn.BatchNorm3d(8),
    nn.SyncBatchNorm(8),
    nn.BatchNorm2d(8, track_running_stats=False),
]


@pytest.mark.parametrize("module", BATCH_NORMS, ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_reported_in_any_mode(module, training):
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), copy.deepcopy(module))}).train(training)
    problem = validate(model)[0]
    assert problem.startswith(f"a.1 ({type(module).__name__}) mixes the samples")
    assert "adaclip.fix" in problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), ["running statistics", "adaclip.fix"]),
        (nn.Embedding(5, 2, max_norm=1.0), ["max_norm", "adaclip.fix"]),
        (nn.Embedding(5, 2, scale_grad_by_freq=True), ["scale_grad_by_freq", "adaclip.fix"]),
        (nn.EmbeddingBag(5, 2, sparse=True), ["sparse", "adaclip.fix"]),
        (nn.RNN(3, 3), ["no per-sample gradients", "torch.nn.Linear"]),
        (nn.LSTM(3, 3, batch_first=True), ["no per-sample gradients", "torch.nn.Linear"]),
        (nn.GRU(3, 3, batch_first=True), ["no per-sample gradients", "torch.nn.Linear"]),
        (nn.LSTMCell(3, 3), ["no per-sample gradients", "torch.nn.Linear"]),
        (nn.Sequential(nn.GRU(3, 3).requires_grad_(False), nn.Linear(3, 3)), ["batch_first=True"]),
        (nn.MultiheadAttention(4, 2), ["batch_first=True"]),
        (nn.TransformerEncoderLayer(4, 2, 8), ["self_attn", "batch_first=True"]),
        (nn.Sequential(nn.Linear(2, 2), nn.Softmax(dim=0)), ["dim=0"]),
        (nn.Sequential(nn.Linear(2, 2), nn.Flatten(0)), ["start_dim=0"]),
        (nn.utils.spectral_norm(nn.Linear(3, 3)), ["spectral norm", "remove"]),
        (parametrizations.spectral_norm(nn.Linear(3, 3)), ["SpectralNorm", "remove"]),
        (nn.LazyLinear(3), ["without a shape", "run one batch"]),
        (nn.Sequential(nn.ReLU()), ["no parameter to train"]),
        (nn.Linear(3, 3).requires_grad_(False), ["no parameter to train"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_problem_is_one_sentence(module, words):
    (problem,) = validate(module)
    assert all(word in problem for word in words), problem


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.LSTM(3, 3, batch_first=True).requires_grad_(False), nn.Linear(3, 3)),
        nn.MultiheadAttention(4, 2, batch_first=True),
        nn.InstanceNorm2d(4, affine=True),
        nn.Embedding(5, 2, padding_idx=0),
        nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Softmax(dim=1), nn.Flatten()),
        parametrizations.weight_norm(nn.Linear(3, 3)),
        parametrizations.orthogonal(nn.Linear(3, 3)),
        nn.Linear(3, 3).half(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_sound_modules_are_not_reported(module):
    assert validate(module) == []


def test_a_parametrization_that_keeps_state_is_reported():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, weight):
            self.calls += 1
            return weight

    model = nn.Linear(3, 3)
    parametrize.register_parametrization(model, "weight", Counting())
    assert "parametrization (Counting)" in validate(model)[0]


def test_fixed_network_trains_sample_by_sample():
    model = network()
    assert len(validate(model)) == 4
    before = copy.deepcopy(model.state_dict())
    fixed = fix(model)
    assert validate(fixed) == []
    # The given model is as it was, and shares nothing with the copy.
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert len(validate(model)) == 4
    assert {p.data_ptr() for p in model.parameters()}.isdisjoint(p.data_ptr() for p in fixed.parameters())
    assert dict(fixed.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert not any(getattr(m, "inplace", False) for m in fixed.modules())

    fixed = fixed.double().eval()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    out = fixed(x)
    torch.testing.assert_close(out, torch.cat([fixed(x[i : i + 1]) for i in range(4)]))
    fixed.train()
    fixed(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in fixed.parameters())


def test_fix_is_idempotent():
    once = fix(network())
    twice = fix(once)
    assert repr(twice) == repr(once)
    assert all(
        torch.equal(a, b)
        for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True)
    )


@settings(deadline=None)
@given(channels=st.integers(1, 600))
def test_groups_divide_the_channels(channels):
    norm = fix(nn.BatchNorm2d(channels))
    assert channels % norm.num_groups == 0
    assert norm.num_groups <= 32
    assert norm.num_groups == 1 or channels // norm.num_groups >= 4
    larger = range(norm.num_groups + 1, min(32, channels // 4) + 1)
    assert not any(channels % g == 0 for g in larger)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_root_batch_norm_keeps_parameters_dtype_and_mode(dtype, training):
    norm = nn.BatchNorm2d(64, eps=1e-3, dtype=dtype).train(training)
    norm.weight.data.uniform_()
    norm.bias.requires_grad_(False)
    fixed = fix(norm)
    assert type(fixed) is nn.GroupNorm
    assert (fixed.num_groups, fixed.num_channels, fixed.eps, fixed.affine) == (16, 64, 1e-3, True)
    assert fixed.training is training
    assert torch.equal(fixed.weight, norm.weight)
    assert fixed.weight.dtype == dtype
    assert fixed.weight.requires_grad
    assert not fixed.bias.requires_grad
    assert list(fixed.state_dict()) == ["weight", "bias"]


def test_device_is_kept():
    assert fix(nn.BatchNorm2d(8, device="meta")).weight.device.type == "meta"


def test_a_shared_batch_norm_and_shared_parameters_stay_shared():
    shared, tied = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    other = nn.BatchNorm2d(8)
    other.weight = tied.weight
    fixed = fix(nn.ModuleList([shared, nn.Sequential(shared), tied, other]))
    assert fixed[0] is fixed[1][0]
    assert fixed[2].weight is fixed[3].weight
    assert fixed[2].bias is not fixed[3].bias


def test_batch_norm_without_affine():
    fixed = fix(nn.BatchNorm1d(8, affine=False))
    assert fixed.weight is None
    assert fixed.bias is None
    assert not fixed.affine
    assert fixed(torch.randn(3, 8)).shape == (3, 8)


def test_instance_norm_and_embedding_settings():
    model = nn.ModuleList(
        [
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            nn.Embedding(5, 2, max_norm=1.0, scale_grad_by_freq=True, sparse=True),
            nn.EmbeddingBag(5, 2, max_norm=1.0),
        ]
    )
    fixed = fix(model)
    assert list(fixed[0].state_dict()) == ["weight", "bias"]
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(fixed[0].eval()(x), fixed[0].train()(x))
    fixed[1](torch.tensor([1, 1])).sum().backward()
    assert not fixed[1].weight.grad.is_sparse
    assert fixed[1].weight.grad[1].tolist() == [2, 2]
    assert validate(fixed) == []


def test_what_needs_a_decision_is_left():
    model = nn.ModuleDict({"rnn": nn.LSTM(3, 3), "spectral": nn.Linear(3, 3)})
    parametrizations.spectral_norm(model["spectral"])
    assert validate(fix(model)) == validate(model)
    assert len(validate(model)) == 2


@pytest.mark.parametrize("affine", [True, False])
def test_lazy_batch_norm(affine):
    model = nn.ModuleDict({"norm": nn.LazyBatchNorm2d(affine=affine), "conv": nn.Conv2d(3, 3, 3)})
    problems = validate(model)
    assert "norm (LazyBatchNorm2d) mixes the samples" in problems[0]
    assert "without a shape" in problems[1]
    with pytest.raises(ValueError, match=r"got norm \(LazyBatchNorm2d\) without: run one batch"):
        fix(model)
    model["norm"](torch.randn(2, 8, 3, 3))
    assert type(fix(model)["norm"]) is nn.GroupNorm


@pytest.mark.parametrize("function", [validate, fix])
def test_not_a_module(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        function(3)


# --- what a pretrained BatchNorm becomes ----------------------------------------------------------------


def pretrained_norm(channels, affine=True, kind=nn.BatchNorm2d):
    norm = kind(channels, eps=1e-3, affine=affine).double()
    g = torch.Generator().manual_seed(channels)
    norm.running_mean.copy_(torch.randn(channels, generator=g))
    norm.running_var.copy_(0.1 + 3 * torch.rand(channels, generator=g))
    if affine:
        norm.weight.data.normal_(generator=g)
        norm.bias.data.normal_(generator=g)
    return norm


def typical(norm, rows=3, size=6):
    """Samples of which every channel has the norm's running mean and variance."""
    x = torch.randn(rows, norm.num_features, size, size, dtype=torch.float64)
    x = (x - x.mean((2, 3), keepdim=True)) / x.var((2, 3), keepdim=True, correction=0).sqrt()
    shape = (1, -1, 1, 1)
    return x * norm.running_var.sqrt().reshape(shape) + norm.running_mean.reshape(shape)


@settings(deadline=None, max_examples=20)
@given(channels=st.integers(1, 70), affine=st.booleans())
def test_a_group_norm_gives_a_typical_sample_the_batch_norms_output(channels, affine):
    norm = pretrained_norm(channels, affine)
    x = typical(norm)
    fixed = fix(norm)
    assert type(fixed) is nn.GroupNorm
    assert fixed.num_groups == 1 or channels // fixed.num_groups >= 16
    torch.testing.assert_close(fixed(x), norm.eval()(x), rtol=1e-9, atol=1e-9)
    assert all(p.requires_grad is affine for p in fixed.parameters())
    # Without the re-fit it does not.
    plain = nn.GroupNorm(fixed.num_groups, channels, 1e-3, affine=False)(x)
    if affine:
        plain = plain * norm.weight.reshape(1, -1, 1, 1) + norm.bias.reshape(1, -1, 1, 1)
    assert channels < 2 or (plain - norm(x)).abs().max() > 1e-3


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", BATCH_NORMS[:4], ids=repr)
def test_a_frozen_batch_norm_is_exact_in_every_mode(kind, affine):
    norm = pretrained_norm(8, affine, type(kind))
    model = nn.Sequential(nn.Identity(), norm)
    fixed = fix(model, batch_norm="frozen")
    assert not affine or validate(fixed) == []
    spatial = {"1": 1, "2": 2, "3": 3}.get(type(kind).__name__[9:10], 2)
    x = torch.randn(4, 8, *[3] * spatial, dtype=torch.float64) * 5
    expected = model.eval()(x)
    for mode in (True, False):
        assert torch.equal(fixed.train(mode)(x), expected)
    assert dict(fixed.named_parameters()).keys() == dict(model.named_parameters()).keys()
    norm.running_mean.fill_(9.0)
    assert torch.equal(fixed(x), expected)
    # What a checkpoint of the original holds can be loaded.
    fixed.load_state_dict(model.state_dict())


def test_parameters_that_are_shared_are_not_fitted_twice():
    one, two = pretrained_norm(8), pretrained_norm(8)
    two.running_mean.neg_()
    two.weight = one.weight
    fixed = fix(nn.ModuleList([one, two]))
    assert fixed[0].weight is fixed[1].weight
    assert torch.equal(fixed[0].weight, one.weight)
    assert torch.equal(fixed[1].bias, two.bias)
    frozen = fix(nn.ModuleList([one, two]), batch_norm="frozen")
    assert frozen[0].weight is frozen[1].weight
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    assert torch.equal(frozen[1](x), two.eval()(x))


def test_a_batch_norm_that_is_frozen_already_stays():
    model = network().train()
    model[1].eval()
    fixed = fix(model)
    assert type(fixed[1]) is nn.BatchNorm2d
    assert not fixed[1].training
    assert type(fixed[3][0].bn) is nn.GroupNorm
    assert validate(fixed) == []
    assert type(fix(model.eval())[1]) is nn.GroupNorm


def test_what_a_batch_norm_may_become_is_checked():
    with pytest.raises(ValueError, match=r"batch_norm must be one of \['frozen', 'group'\], got 'layer'"):
        fix(network(), batch_norm="layer")
    model = nn.Sequential(nn.BatchNorm2d(8, track_running_stats=False))
    with pytest.raises(ValueError, match=r"got 'frozen': 0 \(BatchNorm2d\) keeps no running statistics"):
        fix(model, batch_norm="frozen")
    assert "batch_norm='frozen'" not in validate(model)[0]
    assert "batch_norm='frozen'" in validate(network())[0]


def test_a_batch_norm_with_a_forward_of_its_own_is_left_and_reported():
    class Gated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).sigmoid() * x

    model = nn.Sequential(nn.Conv2d(1, 8, 3), Gated(8))
    fixed = fix(model)
    assert type(fixed[1]) is Gated
    for training in (True, False):
        fixed[1].train(training)
        (problem,) = validate(fixed)
        assert "replace it by hand" in problem
