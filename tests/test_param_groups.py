"""Parameter groups of the optimizer: their own learning rates, weight decays and clipping norms."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_engine import KEY, data, flat, private, small_model, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaclip import PrivacyEngine
from adaclip.clipping import AdaptiveClipping, FlatClipping, PerGroupClipping
from adaclip.testing import relative_error, sample_grads, square_loss

CONV, NORM, HEAD = 0, 1, 4
NORMS = (0.3, 1.0, 0.05)


def split(model):
    """Weights of the body, everything that is no weight, and the head: a layer's parameters in two groups."""
    return [
        [model[CONV].weight],
        [model[CONV].bias, model[NORM].weight, model[NORM].bias, model[HEAD].bias],
        [model[HEAD].weight],
    ]


def grouped(model, norms=NORMS, kind=torch.optim.SGD, **options):
    groups = [
        {"params": params, "lr": 0.1 * (k + 1), "max_grad_norm": c}
        for k, (params, c) in enumerate(zip(split(model), norms, strict=True))
    ]
    return kind(groups, lr=0.1, **options)


def private_groups(model=None, norms=NORMS, **options):
    model = small_model() if model is None else model
    return private(model, optimizer=grouped(model, norms), **options)


def clipped_by_group(model, x, y, norms=NORMS, groups=None):
    """{name: sum_b min(1, C_k/|g_bk|) g_b} in float64, one sample at a time."""
    names = {p: n for n, p in model.named_parameters()}
    grads = sample_grads(model, x, y, square_loss)
    total = {}
    for params, c in zip(groups or split(model), norms, strict=True):
        mine = [names[p] for p in params if p.requires_grad]
        for name in mine:
            total[name] = torch.zeros_like(grads[name][0])
        for b in range(len(x)):
            norm = math.sqrt(sum(grads[name][b].square().sum().item() for name in mine))
            for name in mine:
                total[name] += grads[name][b] * min(1.0, c / max(norm, 1e-300))
    return total


@pytest.mark.parametrize("path", [{}, {"max_batch_size": 3}, {"pad_to": 25}, {"backend": "reference"}])
def test_every_group_is_clipped_to_its_own_norm(path):
    model = small_model()
    reference = copy.deepcopy(model)
    _, model, optimizer, loader = private_groups(model, **path)
    rows = []
    for x, y in loader:
        square_loss(model(x), y).backward()
        rows.append((x[: loader.current.rows], y[: loader.current.rows]))
        if loader.current.last:
            break
    x, y = (torch.cat(part) for part in zip(*rows, strict=True))
    truth = clipped_by_group(reference, x, y)
    for name, p in model.named_parameters():
        assert relative_error(p.grad * 10, truth[name]) < 1e-5
    assert optimizer.clipping.name == "per_group"
    assert optimizer.max_grad_norm == pytest.approx(math.hypot(*NORMS))


class TiedAndTwice(nn.Module):
    """A layer used twice, and one weight in two layers of which each has a bias in another group."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.twice = nn.Linear(6, 6)
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)
        self.right.weight = self.left.weight
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        h = self.twice(self.twice(x[:, 0]).tanh())
        h = self.left(h) + self.right(h).sin()
        return self.attention(h, h, h, need_weights=False)[0].flatten(1)[:, :3]


@pytest.mark.filterwarnings("ignore:adaclip has no fast")
def test_layers_used_twice_tied_weights_and_the_fallback():
    model = TiedAndTwice()
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(
        [{"params": weights, "max_grad_norm": 0.2}, {"params": biases, "max_grad_norm": 0.7}], lr=0.1
    )
    _, model, optimizer, loader = private(model, optimizer=optimizer)
    x, y = next(iter(loader))
    square_loss(model(x), y).backward()
    own = dict(reference.named_parameters())
    groups = [
        [own[n] for n, p in model.named_parameters() if (p.dim() > 1) is wide] for wide in (True, False)
    ]
    truth = clipped_by_group(reference, x, y, (0.2, 0.7), groups)
    for name, p in model.named_parameters():
        assert relative_error(p.grad * 10, truth[name]) < 1e-5, name


@settings(max_examples=25, deadline=None)
@given(
    exponents=st.lists(st.floats(-18, 18), min_size=1, max_size=4),
    norms=st.tuples(*[st.floats(1e-3, 1e3)] * 3),
)
def test_no_sample_adds_more_to_a_group_than_its_norm(exponents, norms):
    """Norms are upper bounds in every group, so that the release has the sensitivity sqrt(sum_k C_k^2)."""
    for e in exponents:
        model = small_model()
        x, y = data(1)
        engine = PrivacyEngine()
        model, _optimizer, loader = engine.make_private(
            module=model,
            optimizer=grouped(model, norms),
            data_loader=DataLoader(TensorDataset(x * 10.0**e, y * 10.0**e), batch_size=1),
            noise_multiplier=1.0,
        )
        x, y = next(iter(loader))
        square_loss(model(x), y).backward()
        for params, c in zip(split(model), norms, strict=True):
            added = torch.cat([p.grad.flatten().double() for p in params]).norm().item()
            assert added <= c * (1 + 2**-20)
        engine.detach(model)


def noise_of(optimizer, params):
    """Per-parameter standard deviations of what one release adds to the mean gradient, times q N."""
    before = [p.detach().clone() for p in params]
    optimizer.step()
    return [
        (p.detach() - b).std().item() / lr * optimizer.expected_batch_size
        for p, b, lr in zip(params, before, (0.1, 0.5), strict=True)
    ]


def two_linears(allocation=None, frozen=False, **options):
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 600, bias=False), nn.Linear(600, 3, bias=False))
    second = model[2].weight
    second.requires_grad_(not frozen)
    groups = [
        {"params": [model[1].weight], "max_grad_norm": 2.0},
        {"params": [second], "max_grad_norm": 0.5, "lr": 0.5},
    ]
    if allocation is not None:
        options["clipping"] = PerGroupClipping(allocation)
    made = private(model, optimizer=torch.optim.SGD(groups, lr=0.1), sigma=1.5, **options)
    return *made, [model[1].weight, second]


@pytest.mark.parametrize(
    ("allocation", "stds"),
    [
        (None, [1.5 * 2.0 * math.sqrt(2), 1.5 * 0.5 * math.sqrt(2)]),
        ("threshold", [1.5 * 2.0 * math.sqrt(2), 1.5 * 0.5 * math.sqrt(2)]),
        ("equal", [1.5 * math.hypot(2.0, 0.5)] * 2),
    ],
)
def test_the_noise_of_each_group(allocation, stds):
    _, _, optimizer, loader, params = two_linears(allocation)
    next(iter(loader))
    measured = noise_of(optimizer, params)
    assert measured == [pytest.approx(stds[0], rel=0.03), pytest.approx(stds[1], rel=0.08)]
    # One Gaussian mechanism of noise multiplier 1.5.
    assert sum((c / s) ** 2 for c, s in zip((2.0, 0.5), stds, strict=True)) == pytest.approx(1.5**-2)


@pytest.mark.parametrize("allocation", ["threshold", "equal"])
def test_a_frozen_group_takes_no_share_of_the_noise_until_it_is_unfrozen(allocation):
    _, model, optimizer, loader, params = two_linears(allocation, frozen=True)
    batches = iter(loader)
    next(batches)
    alone, nothing = noise_of(optimizer, params)
    assert alone == pytest.approx(1.5 * 2.0, rel=0.03)
    assert nothing == 0
    x, y = next(batches)
    # Unfrozen within a step, before its backward or after: what is released decides.
    square_loss(model(x), y).backward()
    params[1].requires_grad_(True)
    both = noise_of(optimizer, params)
    shares = sum((c / s) ** 2 for c, s in zip((2.0, 0.5), both, strict=True))
    assert shares == pytest.approx(1.5**-2, rel=0.1)
    x, y = next(batches)
    reference = copy.deepcopy(model)
    optimizer.zero_grad()
    square_loss(model(x), y).backward()
    own = [[reference[1].weight], [reference[2].weight]]
    truth = clipped_by_group(reference, x, y, (2.0, 0.5), own)
    for name, p in model.named_parameters():
        assert relative_error(p.grad * 10, truth[name]) < 1e-5


def test_unfreezing_between_two_parts_of_a_logical_batch_is_covered():
    """The second part adds to both groups: noise for one group alone would not cover it."""
    _, model, optimizer, loader, params = two_linears("threshold", frozen=True, max_batch_size=2)
    batches = iter(loader)
    x, y = next(batches)
    square_loss(model(x), y).backward()
    params[1].requires_grad_(True)
    while not loader.current.last:
        x, y = next(batches)
        square_loss(model(x), y).backward()
    assert noise_of(optimizer, params)[0] == pytest.approx(1.5 * 2.0 * math.sqrt(2), rel=0.03)


def test_a_changed_norm_counts_from_the_next_logical_batch_on():
    model = small_model()
    _, model, optimizer, loader = private_groups(model, max_batch_size=4, sigma=0.0)
    reference = copy.deepcopy(model)
    batches = iter(loader)
    rows = []
    x, y = next(batches)
    assert not loader.current.last
    square_loss(model(x), y).backward()
    rows.append((x, y))
    optimizer.param_groups[0]["max_grad_norm"] = 30.0
    while not loader.current.last:
        x, y = next(batches)
        square_loss(model(x), y).backward()
        rows.append((x, y))
    truth = clipped_by_group(reference, *(torch.cat(part) for part in zip(*rows, strict=True)))
    assert relative_error(model[CONV].weight.grad * 10, truth["0.weight"]) < 1e-5
    optimizer.step()
    assert optimizer.used_thresholds.tolist() == list(NORMS)
    reference = copy.deepcopy(model)
    rows = []
    while not (rows and loader.current.last):
        x, y = next(batches)
        square_loss(model(x), y).backward()
        rows.append((x, y))
    truth = clipped_by_group(
        reference, *(torch.cat(part) for part in zip(*rows, strict=True)), (30.0, *NORMS[1:])
    )
    assert relative_error(model[CONV].weight.grad * 10, truth["0.weight"]) < 1e-5
    optimizer.step()
    assert optimizer.used_thresholds.tolist() == [30.0, *NORMS[1:]]


def test_a_group_that_is_added_later():
    model = small_model()
    body, head = (
        [p for n, p in model.named_parameters() if not n.startswith("4.")],
        list(model[4].parameters()),
    )
    for p in head:
        p.requires_grad_(False)
    optimizer = torch.optim.SGD([{"params": body, "max_grad_norm": 0.5}], lr=0.1)
    _, model, optimizer, loader = private(model, optimizer=optimizer)
    batches = iter(loader)
    x, y = next(batches)
    square_loss(model(x), y).backward()
    added = {"params": head, "max_grad_norm": 0.1, "lr": 0.3}
    with pytest.raises(RuntimeError, match="between two logical batches"):
        optimizer.add_param_group(added)
    optimizer.step()
    with pytest.raises(ValueError, match=r"param_groups\[1\] has none"):
        optimizer.add_param_group({"params": head})
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['max_grad_norm'\] must be a positive"):
        optimizer.add_param_group({"params": head, "max_grad_norm": 0.0})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group(added)
    for p in head:
        p.requires_grad_(True)
    x, y = next(batches)
    reference = copy.deepcopy(model)
    square_loss(model(x), y).backward()
    own = [
        [p for n, p in reference.named_parameters() if n.startswith("4.") is last] for last in (False, True)
    ]
    truth = clipped_by_group(reference, x, y, (0.5, 0.1), own)
    for name, p in model.named_parameters():
        assert relative_error(p.grad * 10, truth[name]) < 1e-5
    optimizer.step()
    assert optimizer.used_thresholds.tolist() == [0.5, 0.1]


def test_a_parameter_smuggled_into_a_logical_batch_is_refused():
    model = small_model()
    body = [p for n, p in model.named_parameters() if not n.startswith("4.")]
    optimizer = torch.optim.SGD([{"params": body, "max_grad_norm": 0.5}], lr=0.1)
    engine, model, optimizer, loader = private(model, optimizer=optimizer)
    x, y = next(iter(loader))
    square_loss(model(x), y).backward()
    optimizer.original_optimizer.add_param_group({"params": [model[4].bias], "max_grad_norm": 1.0})
    with pytest.raises(RuntimeError, match="within a logical batch"):
        optimizer.step()
    assert len(engine.accountant) == 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_learning_rates_and_weight_decays_are_each_groups_own(kind):
    """The update is the plain optimizer's, given the clipped gradients: the extra key is nothing to it."""
    model = small_model()
    plain_model = copy.deepcopy(model)
    optimizer = grouped(model, kind=kind)
    plain = grouped(plain_model, kind=kind)
    for k, decay in enumerate((0.1, 0.0, 0.5)):
        optimizer.param_groups[k]["weight_decay"] = plain.param_groups[k]["weight_decay"] = decay
    _, model, optimizer, loader = private(model, optimizer=optimizer, sigma=0.0)
    for x, y in loader:
        truth = clipped_by_group(plain_model, x, y)
        for name, p in plain_model.named_parameters():
            p.grad = truth[name].float() / 10
        plain.step()
        optimizer.zero_grad()
        square_loss(model(x), y).backward()
        optimizer.step()
        assert torch.allclose(flat(model), flat(plain_model), atol=2e-5)
    assert optimizer.state_dict()["param_groups"] == plain.state_dict()["param_groups"]


def test_state_dicts_go_through_an_ordinary_optimizer_and_back():
    _, model, optimizer, loader = private_groups()
    train(model, optimizer, loader)
    state = optimizer.state_dict()
    assert [g["max_grad_norm"] for g in state["param_groups"]] == list(NORMS)
    plain = grouped(copy.deepcopy(model), (1.0, 1.0, 1.0))
    plain.load_state_dict(state)
    optimizer.load_state_dict(plain.state_dict())
    assert [g["max_grad_norm"] for g in optimizer.param_groups] == list(NORMS)
    # A plain optimizer's state without norms leaves ours; one with others is the new ones.
    for group in state["param_groups"]:
        del group["max_grad_norm"]
    optimizer.load_state_dict(state)
    assert [g["max_grad_norm"] for g in optimizer.param_groups] == list(NORMS)
    optimizer.load_state_dict(grouped(copy.deepcopy(model), (1.0, 2.0, 3.0)).state_dict())
    train(model, optimizer, loader)
    assert optimizer.used_thresholds.tolist() == [1.0, 2.0, 3.0]
    bad = grouped(copy.deepcopy(model), (1.0, 2.0, math.nan)).state_dict()
    with pytest.raises(ValueError, match=r"param_groups\[2\]"):
        optimizer.load_state_dict(bad)
    _, _, flat_optimizer, _ = private()
    with pytest.raises(ValueError, match="before make_private"):
        flat_optimizer.load_state_dict(
            torch.optim.SGD([{"params": small_model().parameters(), "max_grad_norm": 1.0}]).state_dict()
        )


def test_a_checkpoint_of_other_norms_is_refused(tmp_path):
    engine, model, optimizer, loader = private_groups()
    train(model, optimizer, loader)
    engine.save_checkpoint(tmp_path / "c", module=model, optimizer=optimizer)
    same, other = private_groups(), private_groups(norms=(0.3, 1.0, 0.06))
    with pytest.raises(ValueError, match=r"0\.06"):
        other[0].load_checkpoint(tmp_path / "c", module=other[1], optimizer=other[2])
    made = small_model()
    plain = torch.optim.SGD([{"params": params} for params in split(made)], lr=0.1)
    engine, model_of_one_norm, optimizer_of_one_norm, _ = private(made, optimizer=plain)
    with pytest.raises(ValueError, match="per_group"):
        engine.load_checkpoint(tmp_path / "c", module=model_of_one_norm, optimizer=optimizer_of_one_norm)
    same[0].load_checkpoint(tmp_path / "c", module=same[1], optimizer=same[2])
    assert torch.equal(flat(same[1]), flat(model))
    train(*same[1:])


@pytest.mark.parametrize(
    ("norms", "options", "message"),
    [
        ((1.0, None, 1.0), {}, r"param_groups\[1\] has none"),
        (
            (1.0, -1.0, 1.0),
            {},
            r"param_groups\[1\]\['max_grad_norm'\] must be a positive finite number, got -1.0",
        ),
        ((1.0, True, 1.0), {}, "must be a positive"),
        (NORMS, {"max_grad_norm": 1.0}, "max_grad_norm must be left out"),
        (NORMS, {"clipping": "adaptive"}, "clipping must be 'flat', 'per_group'.*got 'adaptive'"),
        (NORMS, {"clipping": AdaptiveClipping(1.0)}, "got 'adaptive'"),
        (NORMS, {"clipping": FlatClipping(1.0)}, "got 'flat'"),
        (NORMS, {"clipping": "sideways"}, "got 'sideways'"),
        ((None, None, None), {"clipping": "per_group"}, r"param_groups\[0\] has none"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(norms, options, message):
    model = small_model()
    optimizer = grouped(model)
    for group, c in zip(optimizer.param_groups, norms, strict=True):
        group["max_grad_norm"] = c
        if c is None:
            del group["max_grad_norm"]
    with pytest.raises(ValueError, match=message):
        private(model, optimizer=optimizer, **options)
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_norms_that_come_after_make_private_are_refused():
    engine, model, optimizer, loader = private()
    optimizer.param_groups[0]["max_grad_norm"] = 0.1
    x, y = next(iter(loader))
    with pytest.raises(ValueError, match="after make_private, which clips by 'flat'"):
        square_loss(model(x), y).backward()
    with pytest.raises(RuntimeError, match="the last backward failed"):
        optimizer.step()
    assert len(engine.accountant) == 0
    with pytest.raises(ValueError, match="comes later"):
        optimizer.add_param_group({"params": [torch.zeros(1)], "max_grad_norm": 0.1})


def test_thresholds_that_were_moved_by_hand_have_their_noise():
    """What clips is what the noise is made for, in both allocations."""
    for allocation in ("threshold", "equal"):
        _, _, optimizer, _, _ = two_linears(allocation)
        optimizer.clipping.thresholds.mul_(3.0)
        shares = (optimizer.clipping.thresholds / optimizer.clipping.noise_scale()).square().sum()
        assert shares.item() == pytest.approx(1.0)


def test_opacus_setter_of_one_norm_is_refused():
    from adaclip.opacus import PrivacyEngine as OpacusEngine

    model = small_model()
    x, y = data(40)
    _, optimizer, _ = OpacusEngine().make_private(
        module=model,
        optimizer=grouped(model),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=10),
        noise_multiplier=1.0,
        max_grad_norm=None,
    )
    with pytest.raises(ValueError, match="each of param_groups"):
        optimizer.max_grad_norm = 2.0
    assert optimizer.clipping.thresholds.tolist() == list(NORMS)


def test_an_allocation_of_another_name():
    with pytest.raises(ValueError, match="allocation must be one of"):
        PerGroupClipping("mine")


class Lamb(torch.optim.SGD):
    """Has a hyper-parameter of its own by the name of the key, as LAMB does."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.defaults["max_grad_norm"] = 1.0
        for group in self.param_groups:
            group.setdefault("max_grad_norm", 1.0)


def test_an_optimizers_own_hyper_parameter_of_that_name_stays_its_own():
    model = small_model()
    _, model, optimizer, loader = private(model, optimizer=Lamb(model.parameters(), 0.1), max_grad_norm=0.5)
    assert optimizer.clipping.name == "flat"
    train(model, optimizer, loader)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.max_grad_norm == 0.5


def test_the_key_replays():
    """Equal keys give equal runs, groups or not."""
    ends = []
    for _ in range(2):
        _, model, optimizer, loader = private_groups(noise_generator=KEY)
        train(model, optimizer, loader)
        ends.append(flat(model))
    assert torch.equal(*ends)
