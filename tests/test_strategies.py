"""Every strategy: the clipped sum is its formula, and no example moves a release by more than is declared."""

import math

import pytest
import torch
from one_step import LAYERS, STRATEGIES, backward, formula, one_step, private

from adaclip.clipping import AdaptiveClipping, Clipping, DCSGDClipping, PerLayerClipping, make_clipping
from adaclip.groups import LabelGroups
from adaclip.step_release import gradient_sigma

C = 0.7
WIDTH = 12
PATHS = {
    "whole": {},
    "micro-batches": {"max_batch_size": 4},
    "padded": {"max_batch_size": 4, "pad_to": 4},
    "views": {"views_per_sample": 4},
    "views in micro-batches": {"views_per_sample": 4, "max_batch_size": 12},
}


def directions(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, WIDTH, generator=g, dtype=torch.float64)
    return rows / rows.norm(dim=1, keepdim=True)


def rows_of(norms, seed=0):
    return (directions(len(norms), seed) * torch.tensor(norms, dtype=torch.float64)[:, None]).float()


def groups():
    return LabelGroups(groups=3)


EVERY_NORM = [10.0**e for e in range(-12, 13)] + [0.0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_clipped_sum_is_its_formula(name, path):
    rows = rows_of(EVERY_NORM)
    made = one_step(rows, STRATEGIES[name](C), groups=groups(), **PATHS[path])
    torch.testing.assert_close(made.gradient, formula(rows, name, C), rtol=0, atol=C * len(rows) * 2.0**-20)


def scattered(images, generator):
    """Views of lengths 0 to 3 times the image's, drawn for each: an augmentation."""
    shape = (len(images), *[1] * (images.dim() - 1))
    return images * 3 * torch.rand(shape, generator=generator)


@pytest.mark.parametrize("limit", [None, 12])
@pytest.mark.parametrize("name", STRATEGIES)
def test_views_are_averaged_and_then_clipped_once(name, limit):
    rows = rows_of([10.0**e for e in range(-4, 5)])
    options = {"views_per_sample": 4, "augmentation": scattered, "max_batch_size": limit}
    made = one_step(rows, STRATEGIES[name](C), **options)
    views = made.rows.double().reshape(len(rows), 4, WIDTH)
    assert not torch.equal(views[:, 0], views[:, 1])
    want = formula(views.mean(1), name, C)
    torch.testing.assert_close(made.gradient, want, rtol=0, atol=C * len(rows) * 2.0**-20)
    per_view = formula(views.flatten(0, 1), name, C) / 4
    assert (per_view - want).norm() > 1e-3


@pytest.mark.parametrize("name", STRATEGIES)
def test_tiny_gradients_are_not_lost(name):
    rows = rows_of([1e-12, 2e-12, 3e-12])
    made = one_step(rows, STRATEGIES[name](C))
    want = formula(rows, name, C)
    torch.testing.assert_close(made.gradient, want, rtol=1e-5, atol=float(want.abs().max()) * 1e-6)


def adversaries():
    """Rows an attacker might bring, against four others that point in about the same direction."""
    others = rows_of([0.1, 0.5, 1.0, 3.0])
    sum_of_others = others.double().sum(0)
    along = sum_of_others / sum_of_others.norm()
    one = {f"1e{e}": along * 10.0**e for e in range(-12, 13, 3)}
    one |= {"opposite": -along * 1e6, "zero": along * 0.0, "at the threshold": along * C}
    poisoned = (along * 1e3).clone()
    poisoned[0] = math.nan
    overflowing = along.clone()
    overflowing[-1] = math.inf
    huge = along * 1e30
    return others, one | {"nan": poisoned, "inf": overflowing, "1e30": huge}


OTHERS, ADVERSARIES = adversaries()


def parts(optimizer):
    """(slice of the statistics, declared sensitivity) of each independent part."""
    start = 0
    for side in optimizer._sum.statistics.parts:
        width = side.width // len(side.sensitivities)
        for bound, _ in side.sensitivities:
            yield slice(start, start + width), bound
            start += width


def check_moved(name, one, two, times):
    """One example's presence, or exchange, moves each part by no more than `times` what it declares."""
    # What the others' float32 sum rounds to is no part of the example's contribution.
    slack = len(OTHERS) * C * 2.0**-22
    moved = two.gradient - one.gradient
    assert moved.isfinite().all()
    assert moved.norm() <= times * C * (1 + 2.0**-20) + slack
    if name.startswith("per_layer"):
        for k, part in enumerate(moved.split([WIDTH // LAYERS] * LAYERS)):
            limit = two.optimizer.clipping.thresholds[k].item()
            assert part.norm() <= times * limit * (1 + 2.0**-20) + slack
    for at, bound in parts(two.optimizer):
        assert (two.statistics[at] - one.statistics[at]).norm() <= times * bound + 1e-12


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_one_example_moves_nothing_by_more_than_declared(name, path):
    options = {"groups": groups(), **PATHS[path]}
    without = one_step(OTHERS, STRATEGIES[name](C), **options)
    before = None
    for what, row in ADVERSARIES.items():
        rows = torch.cat([OTHERS, row[None].float()])
        joined = one_step(rows, STRATEGIES[name](C), **options)
        check_moved(name, without, joined, 1)
        if what in ("nan", "inf"):
            torch.testing.assert_close(joined.gradient, without.gradient, rtol=0, atol=C * 2.0**-20)
            # A mean loss divides by another number of rows, which rounds the others' gradients differently.
            torch.testing.assert_close(joined.statistics, without.statistics, rtol=1e-6, atol=0)
        if before is not None:
            check_moved(name, before, joined, 2)
        before = joined


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_duplicate_in_every_place_of_a_micro_batch_moves_no_more(name):
    without = one_step(OTHERS, STRATEGIES[name](C), groups=groups(), max_batch_size=2)
    for at in range(len(OTHERS) + 1):
        rows = torch.cat([OTHERS[:at], OTHERS[:1] * 100, OTHERS[at:]])
        joined = one_step(rows, STRATEGIES[name](C), max_batch_size=2)
        assert (joined.gradient - without.gradient).norm() <= C * (1 + 2.0**-20) + 8 * C * 2.0**-22


@pytest.mark.parametrize("use", ["reweight", "select"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_weights_of_groups_only_shrink_contributions(name, use):
    chosen = LabelGroups(use, groups=3)
    # A selection as an earlier release would have left it.
    chosen.absorb(torch.tensor([50.0, 1.0, 60.0, 100.0, 100.0, 100.0], dtype=torch.float64), 0)
    state = chosen.state_dict()
    rows = rows_of([0.1, 10.0, 100.0, 1e-3, 5.0, 2.0])

    def run(rows):
        model, optimizer, loader = private(
            rows, clipping=STRATEGIES[name](C), groups=LabelGroups(use, groups=3)
        )
        optimizer.groups.load_state_dict(state)
        backward(model, optimizer, loader)
        made = [p.grad.flatten() for p in model.parameters()]
        return torch.cat(made).double() * optimizer.expected_batch_size, optimizer

    gradient, optimizer = run(rows)
    assert optimizer.groups.selected == 1
    wanted = torch.zeros(WIDTH, dtype=torch.float64)
    for i, row in enumerate(rows):
        full = formula(row[None], name, C)
        w = {"reweight": 0.5 if i % 3 == 1 else 1.0, "select": float(i % 3 == 1)}[use]
        if name in ("automatic", "psac") or w == 0.0:
            wanted += w * full
        elif name.startswith("per_layer"):
            halves = zip(full.split(WIDTH // 2), row.double().split(WIDTH // 2), strict=True)
            wanted += torch.cat([f if f.norm() <= w * r.norm() else w * r for f, r in halves])
        else:
            wanted += full if full.norm() <= w * row.double().norm() else w * row.double()
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=6 * C * 2.0**-20)


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_empty_batch_releases_noise_alone(name):
    rows = rows_of([1.0] * 40)
    model, optimizer, loader = private(
        rows, clipping=STRATEGIES[name](C), sample_rate=1 / 40, groups=groups(), noise_generator=5
    )
    empty = 0
    for t in range(30):
        start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        before = optimizer.clipping.thresholds.clone()
        backward(model, optimizer, loader)
        if loader.current.rows == 0 and not empty:
            empty += 1
            assert not optimizer._sum.statistics.sums.any()
            assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        optimizer.step()
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert not torch.equal(start, after)
        if t == 0:
            moves = optimizer.clipping.side is not None and not name.startswith("dc_sgd")
            assert torch.equal(before, optimizer.clipping.thresholds) == (not moves)
    assert empty


def test_statistics_are_those_of_the_logical_batch_and_halves_add_up():
    rows = rows_of([10.0**e for e in range(-4, 5)])
    for name in ("adaptive", "per_layer_adaptive", "dc_sgd"):
        whole = one_step(rows, STRATEGIES[name](C), groups=groups())
        pieces = one_step(rows, STRATEGIES[name](C), groups=groups(), max_batch_size=2)
        torch.testing.assert_close(pieces.statistics, whole.statistics, rtol=1e-7, atol=0)
        # As two ranks would have them: what each adds up over its own samples, added.
        left = one_step(rows[:6], STRATEGIES[name](C), groups=groups())
        right = one_step(rows[6:], STRATEGIES[name](C), groups=groups())
        torch.testing.assert_close(left.statistics + right.statistics, whole.statistics, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", STRATEGIES)
def test_equal_releases_move_equal_state(name):
    rows = rows_of([0.5, 1.0, 2.0, 4.0])
    ends = []
    for _ in range(2):
        model, optimizer, loader = private(rows, clipping=STRATEGIES[name](C), groups=groups())
        for _ in range(5):
            backward(model, optimizer, loader)
            optimizer.step()
        ends.append((optimizer.clipping.thresholds, *optimizer.groups.state_dict().values()))
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_noise_is_one_mechanism_of_the_declared_multiplier(name):
    """sum_k (C_k / s_k)^2 over the gradient's groups, plus the side releases, is sigma^-2."""
    made = one_step(OTHERS, STRATEGIES[name](C), groups=groups(), noise_multiplier=1.7)
    optimizer = made.optimizer
    sigma_g = optimizer.gradient_noise_multiplier
    scale = optimizer.clipping.noise_scale() * sigma_g
    cost = (optimizer.clipping.thresholds / scale).square().sum().item()
    cost += sum((d / s) ** 2 for side in optimizer._sum.statistics.parts for d, s in side.sensitivities)
    assert cost ** (-0.5) == pytest.approx(1.7, rel=1e-12)
    assert sigma_g == gradient_sigma(1.7, optimizer._sum.statistics.sensitivities)
    assert sigma_g > 1.7


@pytest.mark.parametrize(
    "name", ["flat", "per_layer", "adaptive", "automatic", "psac", "dc_sgd", "dc_sgd_error"]
)
def test_short_names_make_the_strategies(name):
    made = make_clipping(name, 0.3)
    assert isinstance(made, Clipping)
    assert made.name == name
    assert made.max_grad_norm == pytest.approx(0.3)


INFEASIBLE = {
    "adaptive": lambda: AdaptiveClipping(1.0, sigma_b=0.5),
    "per_layer_adaptive": lambda: PerLayerClipping(1.0, quantile=0.5, sigma_b=math.sqrt(0.5)),
    "dc_sgd": lambda: DCSGDClipping(1.0, sigma_h=1.0),
}


@pytest.mark.parametrize("name", INFEASIBLE)
def test_a_split_that_cannot_be_met_is_refused_before_training(name):
    with pytest.raises(ValueError, match="must leave something for the gradient"):
        private(OTHERS, clipping=INFEASIBLE[name](), noise_multiplier=1.0)
    private(OTHERS, clipping=INFEASIBLE[name](), noise_multiplier=0.99)


BAD = {
    "max_grad_norm": lambda: AdaptiveClipping(0.0),
    "quantile": lambda: AdaptiveClipping(1.0, quantile=1.0),
    "rate": lambda: AdaptiveClipping(1.0, rate=-1.0),
    "sigma_b": lambda: AdaptiveClipping(1.0, sigma_b=math.inf),
    "criterion": lambda: DCSGDClipping(1.0, criterion="mean"),
    "percentile": lambda: DCSGDClipping(1.0, percentile=0.0),
    "bins": lambda: DCSGDClipping(1.0, bins=3),
    "sigma_h": lambda: DCSGDClipping(1.0, sigma_h=0.0),
    "memory": lambda: DCSGDClipping(1.0, memory=1.0),
    "stability": lambda: STRATEGIES["automatic"](1.0).__class__(1.0, stability=0.0),
    "r must": lambda: STRATEGIES["psac"](1.0).__class__(1.0, r=math.nan),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    with pytest.raises(ValueError, match=name):
        BAD[name]()
