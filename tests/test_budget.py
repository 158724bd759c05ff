"""Which releases a budget covers: planned schedules as a whole, anything else by an RDP filter at one order."""

import json

import numpy as np
import pytest
import torch
from small_engine import data, private, small_model, train
from torch.utils.data import DataLoader, TensorDataset

from adaclip import PrivacyBudgetExceeded, PrivacyEngine
from adaclip.accounting import (
    ApproximateDP,
    Event,
    Laplace,
    Ledger,
    PLDAccountant,
    RDPAccountant,
    SubsampledGaussian,
    calibrate_noise,
)
from adaclip.accounting.filters import RDPFilter
from adaclip.budget import Budget

STEP = SubsampledGaussian(0.1, 1.5)


def test_a_plan_allows_its_releases_and_no_more():
    budget, spent = Budget(2.0, 1e-5, [Event(STEP, 3)]), Ledger()
    for _ in range(3):
        budget.check(spent, STEP)
        spent.append(STEP)
    with pytest.raises(PrivacyBudgetExceeded, match="all 3 releases"):
        budget.check(spent, STEP)


def test_a_plan_of_several_noises_keeps_their_order():
    other = SubsampledGaussian(0.1, 1.25)
    budget, spent = Budget(2.0, 1e-5, [Event(STEP, 1), Event(STEP, 1), Event(other, 2)]), Ledger()
    for release in (STEP, STEP, other, other):
        wrong = other if release == STEP else STEP
        with pytest.raises(
            PrivacyBudgetExceeded, match=r"2 releases of .*, then 2 releases of .*and nothing else"
        ):
            budget.check(spent, wrong)
        budget.check(spent, release)
        spent.append(release)
    with pytest.raises(PrivacyBudgetExceeded, match="all 4 releases"):
        budget.check(spent, other)
    with pytest.raises(ValueError, match="at least one release"):
        Budget(2.0, 1e-5, [])


@pytest.mark.parametrize(
    "release",
    [SubsampledGaussian(0.1, 1.6), SubsampledGaussian(0.05, 1.5), SubsampledGaussian(1.0, 1.5, "shuffled")],
)
def test_a_plan_refuses_anything_else_even_if_it_costs_less(release):
    budget = Budget(2.0, 1e-5, [Event(STEP, 3)])
    with pytest.raises(PrivacyBudgetExceeded, match="and nothing else"):
        budget.check(Ledger(adjacency="zero_out"), release)
    with pytest.raises(PrivacyBudgetExceeded, match="and nothing else"):
        budget.check(Ledger([(release, 1)], adjacency="zero_out"), STEP)


def test_a_calibrated_plan_is_within_its_target_as_a_whole():
    sigma = calibrate_noise(target_epsilon=2.0, delta=1e-5, sample_rate=0.1, steps=100)
    whole = PLDAccountant()
    whole.step(0.1, sigma, 100)
    assert 2.0 * (1 - 2e-3) <= whole.get_epsilon(1e-5) <= 2.0


@pytest.mark.parametrize("sigmas", [[1.5], [1.5, 3.0, 1.0], [5.0, 0.9]])
def test_the_filter_stops_within_the_rdp_budget(sigmas):
    budget, spent = Budget(2.0, 1e-5), Ledger()

    def release_forever():
        for step in range(10_000):
            release = SubsampledGaussian(0.1, sigmas[step % len(sigmas)])
            budget.check(spent, release)
            spent.append(release)

    with pytest.raises(PrivacyBudgetExceeded, match="RDP filter"):
        release_forever()
    accountant = RDPAccountant()
    accountant.ledger.merge(spent)
    assert accountant.get_epsilon(1e-5) <= 2.0
    if len(sigmas) == 1:  # the order is the accountant's own: nothing is lost
        accountant.step(0.1, sigmas[0])
        assert accountant.get_epsilon(1e-5) > 2.0


def test_the_filter_keeps_its_order_whatever_comes_later():
    kept = RDPFilter(2.0, 1e-5)
    first = kept.epsilon_after(Ledger(), STEP)
    order = kept._order
    spent = Ledger([(STEP, 5), (SubsampledGaussian(0.9, 8.0), 40)])
    later = kept.epsilon_after(spent, SubsampledGaussian(0.01, 0.7))
    assert kept._order == order
    assert later > first
    free = RDPAccountant()
    free.ledger.merge(spent)
    free.step(0.01, 0.7)
    assert later >= free.get_epsilon(1e-5)


def test_the_filter_has_no_share_of_delta_for_releases_that_come_later():
    kept, spent = RDPFilter(2.0, 1e-5), Ledger()
    assert np.isfinite(kept.epsilon_after(spent, STEP))
    assert kept.epsilon_after(spent, ApproximateDP(0.1, 1e-9)) == np.inf
    spent.append(SubsampledGaussian(0.1, 1.5, "truncated_poisson", 1e-12))
    assert kept.epsilon_after(spent, STEP) == np.inf


def test_the_filter_sets_delta_aside_for_what_was_released_before():
    spent = Ledger(
        [(ApproximateDP(0.1, 4e-6), 1), (SubsampledGaussian(0.1, 5.0, "truncated_poisson", 1e-8), 2)]
    )
    kept = RDPFilter(2.0, 1e-5)
    epsilon = kept.epsilon_after(spent, STEP)
    assert kept.state_dict()["reserved"] == pytest.approx(4e-6 + 2e-8 * (1 + np.exp(2.0)))
    free = RDPAccountant()
    free.ledger.merge(spent)
    free.add(STEP)
    assert free.get_epsilon(1e-5) <= epsilon < 2.0
    assert RDPFilter(2.0, 1e-6).epsilon_after(spent, STEP) == np.inf


def test_the_filter_follows_a_growing_ledger_and_a_replaced_one_alike():
    kept, growing = RDPFilter(5.0, 1e-5), Ledger()
    for step in range(12):
        release = SubsampledGaussian(0.1, 1.5 + step // 3)
        asked = kept.epsilon_after(growing, release)
        fresh = RDPFilter.from_state_dict(kept.state_dict())
        assert fresh.epsilon_after(Ledger(growing.events), release) == pytest.approx(asked, rel=1e-12)
        growing.append(release)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": 0.5}, "order must be > 1, got 0.5"),
        ({"order": "best"}, "order must be"),
        ({"reserved": -1.0}, "reserved must be ≥ 0"),
        ({"epsilon": 0.0}, "epsilon must be > 0"),
    ],
)
def test_a_damaged_filter_is_refused(changes, message):
    state = RDPFilter(2.0, 1e-5).state_dict()
    with pytest.raises((ValueError, TypeError), match=message):
        RDPFilter.from_state_dict({**state, **changes})
    with pytest.raises(ValueError, match="filter state must have"):
        RDPFilter.from_state_dict({k: state[k] for k in ("epsilon", "delta")})


@pytest.mark.parametrize(
    "plan",
    [
        None,
        [Event(STEP, 7)],
        [Event(SubsampledGaussian(1.0, 2.0, "shuffled"), 2)],
        [Event(STEP, 2), Event(SubsampledGaussian(0.1, 1.25), 3)],
    ],
)
def test_a_budget_is_restored_from_json(plan):
    budget = Budget(2.0, 1e-5, plan)
    if plan is None:
        budget.check(Ledger(), STEP)
    state = budget.state_dict()
    again = Budget.from_state_dict(json.loads(json.dumps(state)))
    assert again == budget
    assert again.state_dict() == state
    for bad in ({"plan": None, "filter": None}, {"plan": Ledger().state_dict(), "filter": None}):
        with pytest.raises(ValueError, match="plan"):
            Budget.from_state_dict({**state, **bad})


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(0.0, 1e-5), (-1.0, 1e-5), (np.inf, 1e-5), (1.0, 0.0), (1.0, 1.0)]
)
def test_bad_budgets(epsilon, delta):
    with pytest.raises(ValueError, match="target_"):
        Budget(epsilon, delta)


def planned(steps=4):
    model, (x, y) = small_model(), data()
    engine = PrivacyEngine()
    made = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=10),
        target_epsilon=2.0,
        target_delta=1e-3,
        steps=steps,
    )
    return engine, *made


def test_changed_noise_leaves_the_plan():
    engine, model, optimizer, loader = planned()
    optimizer.noise_multiplier *= 2
    with pytest.raises(PrivacyBudgetExceeded, match="set_budget"):
        train(model, optimizer, loader)
    assert len(engine.accountant) == 0
    engine.set_budget(2.0, 1e-3)  # before the first step the rule may be changed
    train(model, optimizer, loader)
    assert len(engine.accountant) == 4


def test_a_planned_run_that_has_begun_keeps_its_rule():
    engine, model, optimizer, loader = planned()
    train(model, optimizer, loader)
    with pytest.raises(RuntimeError, match="before the first step"):
        engine.set_budget(3.0, 1e-3)


def test_a_checkpoint_restores_the_plan(tmp_path):
    engine, model, optimizer, loader = planned(steps=6)
    train(model, optimizer, loader)
    engine.save_checkpoint(tmp_path / "c", module=model, optimizer=optimizer)
    plan = engine._budget
    again, model, optimizer, loader = private(sigma=optimizer.noise_multiplier)
    again.load_checkpoint(tmp_path / "c", module=model, optimizer=optimizer)
    assert again._budget == plan
    with pytest.raises(PrivacyBudgetExceeded, match="all 6 releases"):
        train(model, optimizer, loader, epochs=2)
    assert len(again.accountant) == 6


def test_earlier_releases_count_and_an_rdp_filter_guards_the_rest():
    model, (x, y) = small_model(), data()
    engine = PrivacyEngine()
    engine.accountant.add(Laplace(2.0))  # a noisy mean of the data, say
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=10),
        target_epsilon=3.0,
        target_delta=1e-3,
        epochs=2,
    )
    alone = calibrate_noise(
        target_epsilon=3.0, delta=1e-3, sample_rate=0.25, steps=8, accountant="rdp", spent=()
    )
    assert optimizer.noise_multiplier > alone
    train(model, optimizer, loader, epochs=2)
    spent = RDPAccountant()
    spent.ledger.merge(engine.accountant.ledger)
    assert 3.0 * (1 - 1e-3) <= spent.get_epsilon(1e-3) <= 3.0
    assert engine.get_epsilon(1e-3) < spent.get_epsilon(1e-3)
    with pytest.raises(PrivacyBudgetExceeded, match="RDP filter"):
        train(model, optimizer, loader)
    assert len(engine.accountant) == 8


def test_a_checkpoint_keeps_the_order_of_the_filter(tmp_path):
    engine, model, optimizer, loader = private()
    engine.set_budget(5.0, 1e-5)
    train(model, optimizer, loader)
    engine.save_checkpoint(tmp_path / "c", module=model, optimizer=optimizer)
    terms = engine._budget.state_dict()
    assert terms["filter"]["order"] > 1
    again, model, optimizer, loader = private()
    again.load_checkpoint(tmp_path / "c", module=model, optimizer=optimizer)
    optimizer.noise_multiplier = 7.0
    train(model, optimizer, loader)
    assert again._budget.state_dict() == terms


def test_releases_from_elsewhere_end_a_plan():
    engine, model, optimizer, loader = planned()
    engine.accountant.add(Laplace(50.0))
    with pytest.raises(PrivacyBudgetExceeded, match="and nothing else, got Laplace"):
        train(model, optimizer, loader)
    assert len(engine.accountant) == 0


@pytest.mark.parametrize("adjacency", [None, "replace_one"])
def test_a_shuffled_plan_counts_epochs(adjacency):
    model, (x, y) = small_model(), data()
    engine = PrivacyEngine(adjacency=adjacency)
    with pytest.warns(UserWarning, match="poisson_sampling=True"):
        model, optimizer, loader = engine.make_private_with_epsilon(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
            data_loader=DataLoader(TensorDataset(x, y), batch_size=10, shuffle=True),
            target_epsilon=3.0,
            target_delta=1e-3,
            epochs=2,
            poisson_sampling=False,
        )
    train(model, optimizer, loader, epochs=2)
    assert engine.accountant.adjacency == (adjacency or "zero_out")
    assert 3.0 * (1 - 1e-3) <= engine.get_epsilon(1e-3) <= 3.0
    with pytest.raises(PrivacyBudgetExceeded, match="all 2 releases"):
        train(model, optimizer, loader)


def test_checkpoints_of_another_adjacency_are_refused(tmp_path):
    engine, model, optimizer, loader = private()
    train(model, optimizer, loader)
    engine.save_checkpoint(tmp_path / "c", module=model, optimizer=optimizer)
    other, model, optimizer, _ = private(adjacency="replace_one")
    with pytest.raises(
        ValueError, match="adjacency must be the checkpoint's 'add_remove', got 'replace_one'"
    ):
        other.load_checkpoint(tmp_path / "c", module=model, optimizer=optimizer)
    assert len(other.accountant) == 0


def test_shuffled_batches_have_no_guarantee_under_add_remove():
    model, (x, y) = small_model(), data()
    engine = PrivacyEngine(adjacency="add_remove")
    with pytest.raises(ValueError, match="adjacency must be 'zero_out' or 'replace_one'"):
        engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
            data_loader=DataLoader(TensorDataset(x, y), batch_size=10, shuffle=True),
            noise_multiplier=1.0,
            poisson_sampling=False,
        )
    assert engine._attached is None


def test_replacing_an_example_costs_more_than_adding_one():
    epsilons = []
    for adjacency in (None, "zero_out", "replace_one"):
        engine = PrivacyEngine(adjacency=adjacency)
        engine.accountant.step(0.1, 1.5, 20)
        epsilons.append(engine.get_epsilon(1e-5))
    assert epsilons[0] == epsilons[1] < epsilons[2]
