"""Adaptive thresholds, label groups, schedules, views and smoothing inside the engine's step."""

import copy
import math

import pytest
import torch
from small_engine import CLASSES, batch_of, data, flat, labeled, private, small_model, train_labeled
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaclip import PrivacyBudgetExceeded, PrivacyEngine
from adaclip.accounting import Event, PLDAccountant, SubsampledGaussian
from adaclip.clipping import AdaptiveClipping, DCSGDClipping, FlatClipping, PerLayerClipping
from adaclip.groups import LabelGroups
from adaclip.schedules import Linear, Piecewise
from adaclip.smoothing import NoiseCorrectedNadam, SmoothedLoss
from adaclip.testing import clipped_sum, relative_error, sample_grads, square_loss

STRATEGIES = {
    "flat with a schedule": lambda: FlatClipping(1.0, schedule=Linear(1.0, 0.5, 6)),
    "adaptive": lambda: AdaptiveClipping(0.5, quantile=0.3),
    "per layer": lambda: PerLayerClipping(0.5, quantile=0.5, allocation="equal"),
    "dc_sgd": lambda: DCSGDClipping(1.0),
    "dc_sgd_error": lambda: DCSGDClipping(1.0, criterion="error"),
}


def everything(clipping):
    """A run with all that a step can do at once."""
    model = small_model()
    return labeled(
        model=model,
        optimizer=NoiseCorrectedNadam(model.parameters(), lr=0.01),
        clipping=clipping,
        groups=LabelGroups("reweight", groups=CLASSES),
        smoothing=SmoothedLoss(0.02, signal="snr", threshold=1e6, every=2),
        views_per_sample=2,
        augmentation="flip",
        noise_schedule=Piecewise(((0, 1.0), (3, 1.25))),
        max_batch_size=12,
    )


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, name):
    path, make = tmp_path / "run.pt", STRATEGIES[name]
    _, model, optimizer, loader = everything(make())
    train_labeled(model, optimizer, loader, 9)

    engine, one, first, batches = everything(make())
    # To the end of an epoch: a resumed run draws whole ones.
    train_labeled(one, first, batches, 3)
    engine.save_checkpoint(path, module=one, optimizer=first)
    again, two, second, batches = everything(make())
    again.load_checkpoint(path, module=two, optimizer=second)
    assert torch.equal(second.clipping.thresholds, first.clipping.thresholds)
    train_labeled(two, second, batches, 6)
    assert torch.equal(flat(two), flat(model))
    assert torch.equal(second.clipping.thresholds, optimizer.clipping.thresholds)
    assert torch.equal(second.groups.released["ratios"], optimizer.groups.released["ratios"])
    assert second.smoothing.signal_to_noise == optimizer.smoothing.signal_to_noise
    assert second.releases == 9
    if hasattr(optimizer.clipping, "history"):
        assert torch.equal(second.clipping.history, optimizer.clipping.history)
    assert again.accountant.history == [
        Event(SubsampledGaussian(1 / 3, 1.0), 3),
        Event(SubsampledGaussian(1 / 3, 1.25), 6),
    ]


def test_thresholds_of_a_step_are_what_earlier_steps_released():
    _, model, optimizer, loader = labeled(clipping=AdaptiveClipping(0.2), sigma=0.5)
    reference = copy.deepcopy(model)
    loss = nn.functional.cross_entropy
    for t, (x, y) in enumerate(loader):
        reference.load_state_dict(model.state_dict())
        optimizer.zero_grad()
        loss(model(x), y).backward()
        threshold = float(optimizer.clipping.history[t])
        assert optimizer.max_grad_norm == threshold
        truth = clipped_sum(sample_grads(reference, x, y, loss), threshold)
        for name, p in model.named_parameters():
            assert relative_error(p.grad * 20, truth[name]) < 1e-5
        optimizer.step()
        assert optimizer.max_grad_norm != threshold
        assert optimizer.max_grad_norm == float(optimizer.clipping.history[-1])


@pytest.mark.parametrize("size", [None, 7, 1])
def test_statistics_are_those_of_the_logical_batch(size):
    """Whatever the physical batches: the released numbers, and the thresholds after them, are the same."""
    options = {"groups": LabelGroups(groups=CLASSES), "sigma": 0.8}
    # Noise is the same under one key, so differences are those of the sums.
    runs = [
        labeled(clipping=DCSGDClipping(1.0), max_batch_size=s, **copy.deepcopy(options)) for s in (None, size)
    ]
    for _, model, optimizer, loader in runs:
        train_labeled(model, optimizer, loader, 1)
    whole, split = (made[2] for made in runs)
    assert torch.equal(whole.clipping.thresholds, split.clipping.thresholds)
    assert torch.equal(whole.groups.released["counts"], split.groups.released["counts"])
    assert torch.allclose(whole.groups.released["sums"], split.groups.released["sums"], atol=1.0)


def test_a_skipped_and_an_empty_batch_release_statistics_of_nothing():
    _, model, optimizer, loader = labeled(clipping=AdaptiveClipping(0.5, sigma_b=3.0))
    batches = iter(loader)
    next(batches)
    optimizer.step()
    skipped = float(optimizer.clipping.history[1])
    # Nobody was there: b = 1/2 + noise / (q N), on the grid that the noise covers.
    moved = math.log(skipped / 0.5) / -0.2
    assert moved != 0
    assert moved * 20 / (2.0 / 64) == pytest.approx(round(moved * 20 / (2.0 / 64)), abs=1e-6)

    _, model, optimizer, loader = labeled(clipping=AdaptiveClipping(0.5, sigma_b=3.0))
    x, y = batch_of(loader)
    nn.functional.cross_entropy(model(x[:0]), y[:0], reduction="sum").backward()
    optimizer.step()
    assert float(optimizer.clipping.history[1]) == skipped


def test_an_abandoned_batch_leaves_no_statistics():
    _, model, optimizer, loader = labeled(
        clipping=AdaptiveClipping(0.5), groups=LabelGroups(groups=CLASSES), max_batch_size=4
    )
    sums = optimizer._sum.statistics.sums
    x, y = batch_of(loader)
    nn.functional.cross_entropy(model(x), y).backward()
    assert float(sums[1 + CLASSES :].sum()) == 4
    x, y = batch_of(loader)
    optimizer.zero_grad()
    assert not sums.any()
    nn.functional.cross_entropy(model(x), y).backward()
    assert float(sums[1 + CLASSES :].sum()) == 4
    # A backward that breaks off takes the whole sum with it.
    with pytest.raises(RuntimeError):
        nn.functional.cross_entropy(model(x), y).backward()
    optimizer.zero_grad()
    assert not sums.any()


def test_a_first_part_that_trains_nothing_does_not_drop_the_batch():
    _, model, optimizer, loader = labeled(clipping="adaptive", max_batch_size=5)
    begun = 0
    for x, y in loader:
        info = loader.current
        optimizer.zero_grad()
        if info.first:
            nn.functional.cross_entropy(model(x[:0]), y[:0], reduction="sum").backward()
            assert optimizer._sum.holds(info.step)
            begun += 1
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert optimizer.releases == begun == 3


def test_thresholds_may_not_move_between_backward_and_step():
    engine, model, optimizer, loader = labeled(clipping="adaptive")
    x, y = batch_of(loader)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.clipping.thresholds.mul_(0.5)
    before = flat(model)
    with pytest.raises(RuntimeError, match="thresholds were changed between backward"):
        optimizer.step()
    assert torch.equal(before, flat(model))
    assert len(engine.accountant) == 0


# --- what is booked ----------------------------------------------------------------------------------


def test_the_ledger_holds_the_whole_steps_noise():
    groups = LabelGroups(groups=CLASSES, sigma_s=40.0, sigma_n=30.0)
    engine, model, optimizer, loader = labeled(
        clipping=AdaptiveClipping(sigma_b=5.0), groups=groups, sigma=1.5
    )
    train_labeled(model, optimizer, loader, 4)
    ((release, count),) = engine.accountant.history
    assert (release.sigma, count) == (1.5, 4)
    sigma_g = optimizer.gradient_noise_multiplier
    closed = (sigma_g**-2 + (2 * 5.0) ** -2 + 40.0**-2 + 30.0**-2) ** -0.5
    assert closed == pytest.approx(1.5, rel=1e-12)
    assert sigma_g > 1.5
    plain = PLDAccountant()
    plain.step(1 / 3, sigma_g, 4)
    assert engine.get_epsilon(1e-5) > plain.get_epsilon(1e-5)


def test_a_split_that_cannot_be_met_changes_nothing():
    model = small_model()
    x, y = data(20)
    square_loss(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    for options in (
        {"clipping": AdaptiveClipping(sigma_b=0.75), "sigma": 1.5},
        {"groups": LabelGroups(groups=CLASSES, sigma_s=2.0, sigma_n=2.0), "sigma": 1.5},
        {"clipping": DCSGDClipping(sigma_h=2.0), "noise_schedule": Linear(1.0, 2.0, 10), "sigma": 1.0},
    ):
        with pytest.raises(ValueError, match="must leave something for the gradient"):
            labeled(model=model, **options)
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


def test_noise_that_is_set_on_the_way_is_split_anew():
    engine, model, optimizer, loader = labeled(clipping=AdaptiveClipping(sigma_b=1.0), sigma=1.0)
    with pytest.raises(ValueError, match="must leave something"):
        optimizer.noise_multiplier = 2.0
    assert optimizer.noise_multiplier == 1.0
    optimizer.noise_multiplier = 1.5
    assert optimizer.gradient_noise_multiplier == pytest.approx((1.5**-2 - 0.25) ** -0.5)
    train_labeled(model, optimizer, loader, 1)
    assert engine.accountant.history == [Event(SubsampledGaussian(1 / 3, 1.5), 1)]


def test_scheduled_noise_is_booked_step_by_step():
    engine, model, optimizer, loader = private(noise_schedule=Piecewise(((0, 2.0), (2, 1.0))), sigma=1.5)
    for x, y in loader:
        optimizer.zero_grad()
        square_loss(model(x), y).backward()
        optimizer.step()
    assert engine.accountant.history == [
        Event(SubsampledGaussian(0.25, 3.0), 2),
        Event(SubsampledGaussian(0.25, 1.5), 2),
    ]
    with pytest.raises(ValueError, match="must be left to noise_schedule"):
        optimizer.noise_multiplier = 1.0


def test_a_scheduled_plan_meets_its_budget_and_is_kept():
    model, (x, y) = small_model(), data()
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=10),
        target_epsilon=2.0,
        target_delta=1e-3,
        epochs=2,
        noise_schedule=Linear(1.5, 1.0, 8),
        clipping=AdaptiveClipping(sigma_b=5.0),
    )

    def run():
        for a, b in loader:
            optimizer.zero_grad()
            square_loss(model(a), b).backward()
            optimizer.step()

    run()
    run()
    assert len(engine.accountant.history) == 8
    assert 2.0 * (1 - 1e-3) <= engine.get_epsilon(1e-3) <= 2.0
    with pytest.raises(PrivacyBudgetExceeded, match="all 8 releases"):
        run()


def test_bad_combinations():
    for options, message in (
        (
            {"noise_schedule": Linear(1.0, 2.0, 3), "poisson_sampling": False},
            "noise_schedule must be None for shuf",
        ),
        ({"labels": lambda batch: batch[1]}, "labels must be None without groups"),
        ({"views_per_sample": 0}, "views must be at least 1"),
        ({"views_per_sample": 4, "max_batch_size": 3}, "must hold the 4 views"),
        ({"augmentation": "sideways"}, "augmentation must be"),
    ):
        with pytest.raises(ValueError, match=message):
            labeled(**options)
    for options, message in (
        ({"groups": 3}, "groups must be an adaclip.groups.LabelGroups"),
        ({"noise_schedule": 1.0}, "noise_schedule must be an"),
        ({"smoothing": 0.1}, "smoothing must be a SmoothedLoss"),
    ):
        with pytest.raises(TypeError, match=message):
            labeled(**options)


# --- checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clipping": AdaptiveClipping(quantile=0.4)}, "clipping must be the checkpoint's"),
        ({"clipping": "flat"}, "clipping must be the checkpoint's"),
        ({"groups": None}, "groups must be the checkpoint's, but this run has none"),
        ({"groups": LabelGroups("select", groups=CLASSES)}, "groups must be the checkpoint's"),
        ({"smoothing": SmoothedLoss(0.5, signal="always")}, "smoothing must be .* the checkpoint has none"),
        ({"noise_schedule": Linear(1.0, 0.5, 9)}, "noise_schedule must be the checkpoint's None"),
    ],
)
def test_checkpoints_of_another_scheme_change_nothing(tmp_path, changes, message):
    path, options = tmp_path / "run.pt", {"clipping": "adaptive", "groups": LabelGroups(groups=CLASSES)}
    engine, model, optimizer, loader = labeled(**options)
    train_labeled(model, optimizer, loader, 2)
    engine.save_checkpoint(path, module=model, optimizer=optimizer)
    other, model, optimizer, loader = labeled(**{**options, **changes})
    before, threshold = flat(model), optimizer.max_grad_norm
    with pytest.raises(ValueError, match=message):
        other.load_checkpoint(path, module=model, optimizer=optimizer)
    assert torch.equal(before, flat(model))
    assert optimizer.max_grad_norm == threshold
    assert optimizer.releases == len(other.accountant) == 0


def test_checkpoints_hold_no_private_number(tmp_path):
    path = tmp_path / "run.pt"
    groups = LabelGroups(groups=CLASSES, diagnostics=True)
    engine, model, optimizer, loader = labeled(clipping="adaptive", groups=groups, max_batch_size=6)
    batches = iter(loader)
    x, y = next(batches)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer._sum.statistics.sums.fill_(12345.678)
    optimizer.groups._raw = torch.full((2 * CLASSES,), 12345.678, dtype=torch.float64)
    engine.save_checkpoint(path, module=model, optimizer=optimizer)
    assert "12345.678" not in repr(torch.load(path, weights_only=True))


def test_labels_come_from_a_function_too():
    seen = []

    def labels(batch):
        seen.append(batch[0].shape[0])
        return 2 - batch[1]

    groups = LabelGroups(groups=CLASSES, diagnostics=True)
    _, model, optimizer, loader = labeled(groups=groups, labels=labels, sigma=1.0)
    _, plain, other, batches = labeled(groups=groups, sigma=1.0)
    train_labeled(model, optimizer, loader, 1)
    train_labeled(plain, other, batches, 1)
    assert seen
    assert torch.equal(optimizer.groups.private["counts"], other.groups.private["counts"].flip(0))


def test_without_noise_the_step_is_clipped_sgd_at_the_threshold_in_force():
    model = small_model()
    reference = copy.deepcopy(model)
    clipping, groups = AdaptiveClipping(0.3), LabelGroups(groups=CLASSES)
    engine, model, optimizer, loader = labeled(model, clipping=clipping, groups=groups, sigma=0.0)
    loss = nn.functional.cross_entropy
    for t, (x, y) in enumerate(loader):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        threshold = float(optimizer.clipping.history[t])
        truth = clipped_sum(sample_grads(reference, x, y, loss), threshold)
        with torch.no_grad():
            for name, p in reference.named_parameters():
                p -= 0.1 * truth[name].float() / 20
    assert torch.allclose(flat(model), flat(reference), atol=1e-6)
    assert optimizer.gradient_noise_multiplier == 0.0
    assert engine.get_epsilon(1e-5) == math.inf
    # The statistics keep their own noise.
    assert not torch.equal(optimizer.groups.released["counts"], optimizer.groups.released["counts"].round())


def test_thresholds_move_within_a_shuffled_epoch_too():
    with pytest.warns(UserWarning, match="poisson_sampling=True"):
        engine, model, optimizer, loader = labeled(clipping="adaptive", poisson_sampling=False, sigma=0.9)
    train_labeled(model, optimizer, loader, 6)
    assert len(set(optimizer.clipping.history.tolist())) == 7
    assert engine.accountant.history == [Event(SubsampledGaussian(1.0, 0.9, "shuffled"), 2)]
