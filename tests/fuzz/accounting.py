"""Cases of adaclip.accounting: releases, accountants, ledgers, calibration, curves."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from fuzz.bounds import attempt
from fuzz.values import ANYTHING, arguments, changed, mostly
from hypothesis import strategies as st

from adaclip import accounting
from adaclip.accounting import Ledger, create_accountant

_RATE = st.floats(0, 1) | st.sampled_from([1e-12, 1e-3, 0.01, 0.5, 1.0])
_SIGMA = st.floats(0.3, 30) | st.sampled_from([0.0, 1e-3, 1e-12, 1.0, 1e9, math.inf])
_DELTA = st.sampled_from([1e-12, 1e-9, 1e-5, 1e-5, 0.1])
_EPSILON = st.floats(0.01, 20)
_NAME = st.sampled_from(["pld", "rdp"])
_ADJACENCY = st.sampled_from(accounting.ADJACENCIES)
_SAMPLING = st.sampled_from(accounting.SAMPLINGS)
_COUNT = st.integers(0, 3000)


def _release(draw: Any) -> Any:
    kind, valid = draw(
        st.sampled_from(
            [
                (
                    accounting.SubsampledGaussian,
                    {"q_": _RATE, "sigma_": _SIGMA, "sampling": _SAMPLING, "overflow": _RATE},
                ),
                (accounting.SubsampledGaussian, {"q_": _RATE, "sigma_": _SIGMA}),
                (accounting.Laplace, {"scale_": st.floats(0.01, 1e3)}),
                (accounting.PureDP, {"epsilon_": _EPSILON}),
                (accounting.ApproximateDP, {"epsilon_": _EPSILON, "delta_": _RATE}),
            ]
        )
    )
    return attempt(lambda: kind(**arguments(draw, **valid)))


def _accountant(draw: Any) -> accounting.Accountant:
    """An accountant with up to two kinds of releases."""
    accountant = create_accountant(draw(_NAME), draw(_ADJACENCY))
    for _ in range(draw(st.integers(0, 2))):
        how, release = _release(draw)
        if how == "ok":
            count = draw(_COUNT)
            attempt(lambda: accountant.add(release, count))  # noqa: B023 - called at once
    return accountant


def releases(draw: Any) -> str:
    """Releases, and the ledger after one that is refused."""
    how, release = _release(draw)
    ledger = Ledger(adjacency=draw(_ADJACENCY))
    before = ledger.state_dict()
    booked, _ = attempt(
        lambda: ledger.append(release if how == "ok" else draw(ANYTHING), draw(mostly(_COUNT)))
    )
    if booked != "ok":
        assert ledger.state_dict() == before
    assert Ledger.from_state_dict(json.loads(json.dumps(ledger.state_dict(), allow_nan=False))) == ledger
    return f"{how}, {booked}"


def accountants(draw: Any) -> str:
    """Questions to an accountant; what it says is a bound in its range, and asking changes nothing."""
    how, accountant = attempt(lambda: create_accountant(**arguments(draw, name_=_NAME, adjacency=_ADJACENCY)))
    if how != "ok":
        return how
    accountant = _accountant(draw)
    before = accountant.state_dict()
    group = st.sampled_from([1, 1, 1, 2, 50])
    question = draw(st.sampled_from(["epsilon", "bounds", "delta", "after", "step", "load"]))
    if question == "step":
        how, _ = attempt(lambda: accountant.step(**arguments(draw, q_=_RATE, sigma_=_SIGMA, count=_COUNT)))
        if how == "ok":
            return how
    elif question == "load":
        state = changed(draw, before)
        how, _ = attempt(lambda: accountant.load_state_dict(state))
        if how == "ok":
            return how
    elif question == "after":
        _, release = _release(draw)
        kwargs = arguments(draw, release_=st.just(release), count_=_COUNT, delta_=_DELTA)
        how, value = attempt(lambda: accountant.epsilon_after(**kwargs))
        assert how != "ok" or value >= 0
    elif question == "delta":
        how, value = attempt(lambda: accountant.delta_bounds(**arguments(draw, epsilon_=_EPSILON)))
        assert how != "ok" or 0 <= value[0] <= value[1] <= 1
    else:
        ask = accountant.get_epsilon if question == "epsilon" else accountant.epsilon_bounds
        how, value = attempt(lambda: ask(**arguments(draw, delta_=_DELTA, group_size=group)))
        if how == "ok":
            low, high = (0.0, value) if question == "epsilon" else value
            assert 0 <= low <= high
    assert accountant.state_dict() == before
    return f"{question}: {how}"


def calibration(draw: Any) -> str:
    """Calibrated values keep the target."""
    budget = {
        "target_epsilon_": _EPSILON,
        "delta_": _DELTA,
        "accountant": _NAME,
        "adjacency": _ADJACENCY,
        "sampling": st.just("poisson") | _SAMPLING,
        "overflow": st.just(0.0) | _RATE,
        "spent": st.just(()) | st.just(((accounting.Laplace(10.0), 3),)),
    }
    rate, sigma = st.sampled_from([1e-6, 1e-3, 0.01, 0.3, 1.0]), st.floats(0.3, 30)
    steps = st.sampled_from([1, 10, 1000, 10**5])
    solve, more = draw(
        st.sampled_from(
            [
                (accounting.calibrate_noise, {"sample_rate_": rate, "steps_": steps}),
                (accounting.calibrate_steps, {"sample_rate_": rate, "noise_multiplier_": sigma}),
                (accounting.calibrate_sample_rate, {"noise_multiplier_": sigma, "steps_": steps}),
            ]
        )
    )
    given = arguments(draw, **budget, **more)
    how, found = attempt(lambda: solve(**given))
    if how != "ok":
        return how
    given = {
        "accountant": "pld",
        "adjacency": "add_remove",
        "sampling": "poisson",
        "overflow": 0.0,
        "spent": (),
    } | given
    name = solve.__name__.removeprefix("calibrate_")
    given |= {{"noise": "noise_multiplier"}.get(name, name): found}
    accountant = create_accountant(given["accountant"], given["adjacency"])
    for event in given["spent"]:
        accountant.add(*event)
    release = accounting.SubsampledGaussian(
        given["sample_rate"], given["noise_multiplier"], given["sampling"], given["overflow"]
    )
    accountant.add(release, given["steps"])
    assert accountant.get_epsilon(given["delta"]) <= given["target_epsilon"] * (1 + 1e-9)
    return f"{name}: ok"


def curves(draw: Any) -> str:
    """Figures about attackers."""
    source = st.just(_accountant(draw)) | st.sampled_from(
        [lambda e: math.exp(-e), lambda e: 2.0, lambda e: "x"]
    )
    prior, size = st.floats(0, 1), st.integers(1, 5)
    kind = draw(st.sampled_from(["advantage", "risk", "curve", "gdp", "rdp", "convert"]))
    if kind == "advantage":
        how, value = attempt(lambda: accounting.advantage(**arguments(draw, source_=source, group_size=size)))
        assert how != "ok" or 0 <= value <= 1
    elif kind == "risk":
        how, value = attempt(
            lambda: accounting.bayes_risk(**arguments(draw, source_=source, prior=prior, group_size=size))
        )
        assert how != "ok" or 0 <= value <= 0.5
    elif kind == "curve":
        alpha = st.lists(st.floats(0, 1), max_size=4) | prior
        given = arguments(
            draw, source_=source, alpha_=alpha, group_size=size, tolerance=st.sampled_from([0.1, 0.01])
        )
        how, value = attempt(lambda: accounting.trade_off_curve(**given))
        assert how != "ok" or bool(((value >= 0) & (value <= 1)).all())
    elif kind == "gdp":
        events = st.just(_accountant(draw).history) | st.just([(accounting.Laplace(1.0), 2)])
        which = draw(st.booleans())
        how, _ = attempt(
            lambda: (
                accounting.gdp_epsilon(**arguments(draw, events_=events, delta_=_DELTA, adjacency=_ADJACENCY))
                if which
                else accounting.gdp_mu(**arguments(draw, events_=events, adjacency=_ADJACENCY))
            )
        )
    elif kind == "rdp":
        orders = st.just(np.array([1.5, 2.0, 30.0])) | st.just(np.array([]))
        how, _ = attempt(
            lambda: accounting.subsampled_gaussian_rdp(
                **arguments(draw, q_=_RATE, sigma_=_SIGMA, orders=orders)
            )
        )
    else:
        rdp, orders = st.just(np.array([0.1, 0.2, 3.0])), st.just(np.array([1.5, 2.0, 30.0]))
        how, _ = attempt(
            lambda: accounting.rdp_to_epsilon(**arguments(draw, rdp_=rdp, delta_=_DELTA, orders_=orders))
        )
    return f"{kind}: {how}"


# With how many of the cases, relative to the others': a calibration takes longer than a constructor.
TARGETS = {
    "releases": (releases, 10),
    "accountants": (accountants, 5),
    "calibration": (calibration, 1),
    "curves": (curves, 5),
}
