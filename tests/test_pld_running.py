"""Bounds of a ledger that grows: the same bits whatever was asked before, and around the reference."""

import json

import numpy as np
import pld_reference as reference
import pytest
from pld_checks import CLOSE, EXACT, sampled

from adaclip.accounting import create_accountant
from adaclip.accounting.pld import epsilon_bounds
from adaclip.accounting.releases import SubsampledGaussian


def decaying(n, start=1.0, q=0.05):
    return [(SubsampledGaussian(q, start + 0.01 * (i % 40)), 20 + i % 3) for i in range(n)]


def booked(steps, adjacency="add_remove"):
    accountant = create_accountant("pld", adjacency)
    for release, count in steps:
        accountant.add(release, count)
    return accountant


def same_as_fresh(accountant, delta=1e-5):
    """The bits of an accountant that never saw anything but this ledger, restored through JSON."""
    fresh = create_accountant("pld", accountant.adjacency)
    fresh.load_state_dict(json.loads(json.dumps(accountant.state_dict())))
    assert accountant.epsilon_bounds(delta) == fresh.epsilon_bounds(delta)


def test_asked_after_every_step():
    accountant = create_accountant("pld")
    for i, (release, count) in enumerate(decaying(34)):
        for part in (1, count - 1):
            accountant.add(release, part)  # the last entry grows while it is asked about
            if i > 14:
                accountant.get_epsilon(1e-5)
        if i in (15, 16, 17, 24, 31, 32, 33):
            same_as_fresh(accountant)


def test_asked_in_any_order():
    rng = np.random.default_rng(0)
    accountant = create_accountant("pld")
    for i, (release, count) in enumerate(decaying(34)):
        if i < 15:
            accountant.add(release, count)
            continue
        predicted = accountant.epsilon_after(release, count, 1e-5)
        other = SubsampledGaussian(0.02, 3.0 + i)
        for delta in rng.choice([1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8], 1).tolist():
            accountant.get_epsilon(delta)
        if i % 3 == 0:
            accountant.epsilon_after(other, 2, 1e-5)
        accountant.add(release, count)
        assert accountant.get_epsilon(1e-5) == predicted
        if i % 8 == 0:
            same_as_fresh(accountant)
            same_as_fresh(accountant, 1e-7)


@pytest.mark.parametrize("n", [17, 20])
def test_loaded_over_another_ledger(n):
    """Where the new ledger shares all, some or none of what was composed, or had no course."""
    first = decaying(n)
    changed = [*first[:15], (SubsampledGaussian(0.01, 7.0), 40), *first[16:]]
    late = [*first[:-2], (SubsampledGaussian(0.015, 2.0), 5), first[-1]]
    full = [(SubsampledGaussian(1.0, 50.0 + i), 1) for i in range(n)]
    silent = [(SubsampledGaussian(1e-9, 20.0 + i), 1) for i in range(n)]
    ledgers = [first, changed, late, full, silent, decaying(n, 3.0), first[:-1], first]
    used = create_accountant("pld")
    for steps in ledgers:
        used.load_state_dict(booked(steps).state_dict())
        used.get_epsilon(1e-5)
        same_as_fresh(used)


def test_merged_and_of_another_adjacency():
    used = booked(decaying(17))
    used.get_epsilon(1e-5)
    used.ledger.merge(booked(decaying(3, 2.0)).ledger)
    same_as_fresh(used)
    one_sided = used.epsilon_bounds(1e-5)
    used.load_state_dict({**used.state_dict(), "adjacency": "replace_one"})
    assert used.epsilon_bounds(1e-5)[0] > one_sided[1]
    for adjacency in ("zero_out", "add_remove"):
        used.load_state_dict({**used.state_dict(), "adjacency": adjacency})
        assert used.epsilon_bounds(1e-5) == one_sided


@pytest.mark.parametrize(
    "tail",
    [
        [(0.01, 10.0, 30)],  # noise × 10
        [(0.5, 8.0, 20)],  # rate × 50
        [(1.0, 20.0, 3)],  # of another kind
        [(1e-4, 0.6, 40), (0.03, 2.0, 11)],
    ],
    ids=str,
)
def test_running_bounds_are_around_the_reference(tail):
    """Steps that the course was not planned for, after those that it was."""
    steps = decaying(17)
    accountant = booked(steps)
    accountant.get_epsilon(1e-5)
    for step in tail:
        accountant.step(*step)
        lower, upper = accountant.epsilon_bounds(1e-5)
        same_as_fresh(accountant)
    known = sampled(*((r.q, r.sigma, n) for r, n in steps), *tail)
    truth = float(reference.Contour(known, delta=1e-5).epsilon(1e-5))
    assert lower * (1 - EXACT) <= truth <= upper * (1 + EXACT)
    assert upper - lower <= CLOSE * upper
    assert epsilon_bounds(accountant.history, 1e-5) == pytest.approx((truth, truth), rel=2 * CLOSE)
