"""What the fuzzers found: inputs that went too far, and the errors that now name them."""

import math
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from small_engine import private

from adaclip import PrivacyEngine, functional, models, schedules
from adaclip.accounting import (
    Laplace,
    Ledger,
    SubsampledGaussian,
    bayes_risk,
    calibrate_noise,
    create_accountant,
    gdp_mu,
    rdp_to_epsilon,
    subsampled_gaussian_rdp,
    trade_off_curve,
)
from adaclip.budget import Budget
from adaclip.checkpoint_form import check_extra
from adaclip.cli import main
from adaclip.clipping import FlatClipping, make_clipping
from adaclip.groups import LabelGroups
from adaclip.noise import NoiseSource
from adaclip.sampler import PoissonLoader
from adaclip.smoothing import DiSK, NoiseCorrectedNadam, SmoothedLoss, moving_average

HUGE = 10**400  # below infinity, and no float


def test_an_int_that_no_float_holds_is_out_of_range():
    with pytest.raises(ValueError, match="max_grad_norm must be a positive finite number"):
        FlatClipping(HUGE)
    with pytest.raises(ValueError, match="start must be a positive finite number"):
        schedules.Linear(HUGE, 1.0, 3)
    with pytest.raises(ValueError, match="target_epsilon must be a positive finite number"):
        Budget(HUGE, 1e-5)
    with pytest.raises(ValueError, match="noise_multiplier must be finite"):
        functional.clip_and_noise(torch.ones(2, 3), max_grad_norm=1.0, noise_multiplier=HUGE)
    with pytest.raises(ValueError, match="std must be finite and at least 0"):
        NoiseSource(1).normal_(torch.ones(3), 0, std=HUGE)
    with pytest.raises(ValueError, match="noise_multiplier must be finite"):
        private(sigma=HUGE)


def test_a_schedule_long_after_its_end():
    assert schedules.Linear(1.0, 0.5, 3)(HUGE) == 0.5


@pytest.mark.parametrize(
    "value",
    ["1", True, np.bool_(True), None, 1j, [1.0], np.array([1.0]), int, torch.empty((), device="meta")],
)
def test_accounting_takes_single_numbers_only(value):
    with pytest.raises(TypeError, match="sigma must be a number"):
        SubsampledGaussian(0.1, value)
    with pytest.raises(TypeError, match="delta must be a number"):
        create_accountant("rdp").get_epsilon(value)


def test_accounting_takes_scalars_of_numpy_and_torch():
    made = SubsampledGaussian(np.float32(0.5), torch.tensor(2.0))
    assert made == SubsampledGaussian(0.5, 2.0)


def test_a_truth_value_is_no_count():
    with pytest.raises(TypeError, match="count must be an integer"):
        create_accountant("pld").step(0.1, 1.0, True)


@pytest.mark.parametrize("events", [3, [1], ["abc"], [(Laplace(1.0),)], torch.tensor(1.0)])
def test_events_must_be_pairs(events):
    with pytest.raises(TypeError, match=r"must be \(release, count\) pairs"):
        gdp_mu(events)
    with pytest.raises(TypeError, match=r"spent must be \(release, count\) pairs"):
        calibrate_noise(target_epsilon=1.0, delta=1e-5, sample_rate=0.1, steps=3, spent=events)
    with pytest.raises(TypeError, match=r"events must be \(release, count\) pairs"):
        Ledger(events)


def test_gdp_counts_are_checked():
    with pytest.raises(ValueError, match="count must be an integer"):
        gdp_mu([(SubsampledGaussian(0.1, 1.0), -1)])


def test_an_rdp_that_is_nan_is_no_epsilon_of_0():
    with pytest.raises(ValueError, match="rdp must be ≥ 0, got nan"):
        rdp_to_epsilon(np.array([math.nan, 1.0]), 1e-5, np.array([2.0, 3.0]))
    with pytest.raises(ValueError, match=r"rdp must be \[2\]"):
        rdp_to_epsilon(np.array([1.0]), 1e-5, np.array([2.0, 3.0]))
    with pytest.raises(TypeError, match="orders must be an array"):
        subsampled_gaussian_rdp(0.1, 1.0, "x")


def test_curves_name_what_is_wrong():
    with pytest.raises(TypeError, match="alpha must be numbers"):
        trade_off_curve(lambda e: 0.0, "x")
    with pytest.raises(TypeError, match=r"source\(.*\) must be a delta"):
        bayes_risk(lambda e: "x")


def test_groups_are_not_counted_up_to_a_number_that_memory_does_not_hold():
    for groups in (10**12, HUGE, [0, 10**12], {0: 10**15}):
        with pytest.raises(ValueError, match="groups must"):
            LabelGroups(groups=groups)
    with pytest.raises(ValueError, match="groups must map every label"):
        LabelGroups(groups={0: 0, "a": 1})


def test_a_norm_below_0_is_no_norm():
    """Its factor would be negative, and bound nothing."""
    factors = functional.clip_factors(torch.tensor([-3.0, 1.0]), 1.0)
    assert factors[0] == 0
    assert 0 < factors[1] <= 1
    with pytest.raises(TypeError, match="norms must be a floating tensor"):
        functional.clip_factors([1.0], 1.0)


def test_functional_names_what_is_no_tensor():
    with pytest.raises(TypeError, match="per_sample_grads must be a tensor"):
        functional.sample_sqnorms(3)
    with pytest.raises(TypeError, match="factors must be a tensor"):
        functional.weighted_sum(torch.ones(2, 3), 3)
    with pytest.raises(TypeError, match="x must be a tensor"):
        functional.weighted_sum([torch.ones(2), torch.ones(2)], torch.ones(2))
    with pytest.raises(ValueError, match="on meta"):
        functional.clip_and_noise(torch.ones(2, 3, device="meta"), max_grad_norm=1.0, noise_multiplier=0.0)


def test_noise_goes_into_tensors():
    with pytest.raises(TypeError, match=r"tensor must be a torch\.Tensor"):
        NoiseSource(1).normal_([0.0], 0)
    with pytest.raises(ValueError, match="backend must be one of"):
        NoiseSource(1).normal_(torch.ones(2), 0, backend=["cpp"])
    with pytest.raises(ValueError, match="q must be in"):
        NoiseSource(1).bernoulli(3, "0.5", 0)


@pytest.mark.parametrize("bad", ["x", None, [1.0], True, HUGE])
def test_optimizers_name_what_is_no_number(bad):
    params = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="lr must be finite"):
        NoiseCorrectedNadam(params, lr=bad)
    with pytest.raises(ValueError, match="betas must be two numbers"):
        NoiseCorrectedNadam(params, betas=bad)
    with pytest.raises(ValueError, match="kappa must be in"):
        DiSK(params, lr=0.1, kappa=bad)
    with pytest.raises(ValueError, match="tau must be finite"):
        SmoothedLoss(bad)
    with pytest.raises(ValueError, match="decay must be in"):
        moving_average(torch.nn.Linear(2, 1), bad)


def test_names_may_be_of_any_type():
    with pytest.raises(ValueError, match="clipping must be one of"):
        make_clipping(["flat"], None)
    with pytest.raises(ValueError, match="kind must be one of"):
        schedules.schedule_from_dict({"kind": ["linear"]})
    with pytest.raises(ValueError, match="kind must be one of"):
        schedules.schedule_from_dict(3)
    with pytest.raises(ValueError, match="plan must be"):
        models.build("vgg-mini", num_classes=2, plan=3)
    with pytest.raises(ValueError, match="activation must be one of"):
        models.build("vgg-mini", num_classes=2, activation=["relu"])


@pytest.mark.parametrize(
    "state",
    [
        3,
        {},
        {"sample_rate": 0.5, "dataset_size": 4},
        {"sample_rate": 0.5, "dataset_size": 4, "step": "x", "epoch": 0},
    ],
)
def test_loader_states(state):
    loader = PoissonLoader(torch.ones(4, 1), sample_rate=0.5)
    before = loader.state_dict()
    with pytest.raises((ValueError, TypeError), match=r"loader|sample_rate"):
        loader.load_state_dict(state)
    assert loader.state_dict() == before


# --- checkpoints -------------------------------------------------------------------------------------------


def _replaced(state, path, value):
    *folders, last = path
    for name in folders:
        state = state[name]
    if value is KeyError:
        del state[last]
    else:
        state[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["version"], KeyError),
        (["module"], KeyError),
        (["module", "0.bias"], 3.0),
        (["accountant"], KeyError),
        (["kinds"], [1]),
        (["kinds", "noise_multiplier"], KeyError),
        (["parts", "clipping"], 1.5),
        (["parts"], KeyError),
        (["loader"], KeyError),
        (["loader", "step"], "x"),
        (["loader", "epoch"], 2**70),
        (["releases"], "many"),
        (["run"], ["a"]),
        (["budget"], KeyError),
        (["budget"], {"epsilon": 1.0}),
        (["budget"], "x"),
        (["extra"], KeyError),
        (["optimizer", "state"], KeyError),
        (["optimizer", "param_groups"], 7),
        (["optimizer"], 2**64),
    ],
)
def test_a_checkpoint_of_another_form_changes_nothing(tmp_path, path, value):
    engine, model, optimizer, _ = private()
    engine.save_checkpoint(tmp_path / "c.pt", module=model, optimizer=optimizer)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    _replaced(state, path, value)
    torch.save(state, tmp_path / "c.pt")
    engine.accountant.step(0.1, 1.0)
    before = engine.accountant.state_dict(), [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"checkpoint|ledger|budget"):
        engine.load_checkpoint(tmp_path / "c.pt", module=model, optimizer=optimizer)
    assert engine.accountant.state_dict() == before[0]
    assert all(torch.equal(a, b) for a, b in zip(before[1], model.parameters(), strict=True))


@pytest.mark.parametrize("extra", [{"a": object()}, {"a": [1, {2: {3}}]}, [1], {"a": np.float64(1)}])
def test_what_could_not_be_loaded_again_is_not_saved(tmp_path, extra):
    engine, model, optimizer, _ = private()
    with pytest.raises(TypeError, match="extra"):
        engine.save_checkpoint(tmp_path / "c.pt", module=model, optimizer=optimizer, extra=extra)
    assert not list(tmp_path.iterdir())


def test_plain_values_can_be_saved():
    check_extra({"a": [None, True, 1, 0.5, "x", b"y", (torch.ones(1),)], "b": OrderedDict(c=1)})
    with pytest.raises(TypeError, match=r"extra\['a'\]\[0\] must be a plain value"):
        check_extra({"a": [pickle]})


def test_what_is_no_adjacency_and_no_delta():
    with pytest.raises(ValueError, match="adjacency must be one of"):
        PrivacyEngine(adjacency=np.array([0.5, 2.0]))
    engine = PrivacyEngine()
    engine.accountant.step(0.1, 1.0)
    with pytest.raises(ValueError, match=r"delta must be at least 2.23e-308, got 1e-320"):
        engine.get_epsilon(1e-320)


def test_calibration_where_delta_is_the_total_variation():
    # 10 steps at a rate of 1e-6: with little noise δ = 1e-5 is what it takes to be drawn at all.
    arguments = {"delta": 1e-5, "sample_rate": 1e-6, "steps": 10, "adjacency": "replace_one"}
    sigma = calibrate_noise(
        target_epsilon=0.318, accountant="pld", sampling="truncated_poisson", overflow=0.0, **arguments
    )
    assert 0 < sigma < 0.3


def test_an_argument_of_lines_is_told_in_one(capsys):
    assert main(["audit", "a\nb"]) == 2
    assert capsys.readouterr().err.endswith("adaclip: error: unrecognized arguments: a b\n")
