"""Schedules of the clipping norm and of the noise: values, limits, and coming back from plain values."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaclip.accounting import create_accountant
from adaclip.planning import calibrate_schedule, planned_events, planned_releases, quantized
from adaclip.schedules import Cosine, Exponential, Linear, Piecewise, check_schedule, schedule_from_dict

FACTORS = st.floats(1e-6, 1e6)
RAMPS = (Linear, Exponential, Cosine)


@st.composite
def schedules(draw):
    kind = draw(st.sampled_from((*RAMPS, Piecewise)))
    if kind is Piecewise:
        later = draw(st.lists(st.integers(1, 500), unique=True, max_size=6))
        return Piecewise(tuple((step, draw(FACTORS)) for step in (0, *sorted(later))))
    return kind(draw(FACTORS), draw(FACTORS), draw(st.integers(1, 500)))


@pytest.mark.parametrize("kind", RAMPS)
@given(start=FACTORS, end=FACTORS, steps=st.integers(1, 300))
def test_ramps_go_from_start_to_end_and_stay_there(kind, start, end, steps):
    schedule = kind(start, end, steps)
    values = [schedule(t) for t in range(steps + 3)]
    assert values[0] == start
    assert values[steps:] == [end] * 3
    assert min(start, end) <= min(values)
    assert max(values) <= max(start, end)
    slack = 1e-12 * max(start, end)
    sign = 1 if end >= start else -1
    assert all(sign * (b - a) >= -slack for a, b in pairwise(values))


def test_values_in_between():
    assert Linear(1.0, 3.0, 4)(1) == 1.5
    assert Exponential(1.0, 16.0, 4)(2) == pytest.approx(4.0)
    assert Cosine(2.0, 1.0, 4)(2) == pytest.approx(1.5)
    pieces = Piecewise(((0, 1.0), (3, 0.5), (5, 2.0)))
    assert [pieces(t) for t in range(7)] == [1.0, 1.0, 1.0, 0.5, 0.5, 2.0, 2.0]


@given(schedules(), st.integers(0, 600))
def test_schedules_come_back_from_json_to_the_last_bit(schedule, t):
    again = schedule_from_dict(json.loads(json.dumps(schedule.state_dict())))
    assert again == schedule
    assert again(t) == schedule(t)
    assert again.state_dict() == schedule.state_dict()
    assert schedule(schedule.length) == schedule(schedule.length + t)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(0.0, 1.0, 5), "start must be a positive finite number, got 0.0"),
        (lambda: Linear(1.0, float("inf"), 5), "end must be a positive"),
        (lambda: Cosine(1.0, 1.0, 0), "steps must be an integer of at least 1, got 0"),
        (lambda: Exponential(1.0, True, 5), "end must be a positive"),
        (lambda: Linear(1.0, 2.0, 5)(-1), "t must be an integer of at least 0, got -1"),
        (lambda: Piecewise(()), "pieces must be"),
        (lambda: Piecewise(((1, 1.0),)), "begin at step 0"),
        (lambda: Piecewise(((0, 1.0), (4, 1.0), (4, 2.0))), "increasing order"),
        (lambda: Piecewise(((0, 1.0), (4,))), r"pieces\[1\] must be a"),
        (lambda: Piecewise(((0, -1.0),)), r"pieces\[0\] factor must be a positive"),
        (lambda: schedule_from_dict({"kind": "sine"}), "schedule kind must be one of"),
        (lambda: schedule_from_dict({"kind": "linear", "start": 1.0}), "cannot be made of"),
    ],
)
def test_bad_schedules(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_only_schedules_are_schedules():
    with pytest.raises(TypeError, match=r"noise_schedule must be an adaclip\.schedules object"):
        check_schedule(lambda t: 1.0, "noise_schedule")
    assert check_schedule(None, "schedule") is None


@given(schedules(), st.integers(1, 400))
def test_quantized_schedules_take_few_values_of_the_schedule(schedule, releases):
    few = quantized(schedule, releases)
    values = [few(t) for t in range(releases)]
    assert len(set(values)) <= 32
    assert set(values) <= {schedule(t) for t in range(releases)}
    if len({schedule(t) for t in range(releases)}) <= 32:
        assert few == schedule


@given(schedules(), st.integers(1, 200), st.floats(0.1, 10.0))
def test_planned_events_are_the_releases_in_their_order(schedule, releases, sigma):
    listed = [
        release.sigma
        for release, count in planned_events(sigma, schedule, releases, 0.1, "poisson")
        for _ in range(count)
    ]
    # The very product that a step books: a plan compares to the last bit.
    assert listed == [sigma * schedule(t) for t in range(releases)]


@pytest.mark.parametrize(
    ("schedule", "accountant"),
    [
        (Linear(2.0, 1.0, 40), "pld"),
        (Exponential(1.0, 3.0, 40), "pld"),
        (Piecewise(((0, 1.0), (10, 0.7))), "pld"),
        (Piecewise(((0, 1.0), (10, 0.7))), "rdp"),
    ],
)
def test_a_calibrated_schedule_meets_its_target_as_a_whole(schedule, accountant):
    few = quantized(schedule, 40)
    arguments = {"delta": 1e-5, "sample_rate": 0.05}
    sigma = calibrate_schedule(
        target_epsilon=2.0,
        steps=40,
        accountant=accountant,
        adjacency="add_remove",
        sampling="poisson",
        spent=(),
        schedule=few,
        **arguments,
    )
    whole = create_accountant(accountant)
    for release, count in planned_events(sigma, few, 40, 0.05, "poisson"):
        whole.add(release, count)
    assert 2.0 * (1 - 1e-3) <= whole.get_epsilon(1e-5) <= 2.0


@pytest.mark.parametrize(
    ("arguments", "releases"),
    [
        ((3, None, 10, "poisson"), 30),
        ((None, 7, 10, "poisson"), 7),
        ((3, None, 10, "shuffled"), 3),
        ((None, 21, 10, "shuffled"), 3),
    ],
)
def test_planned_releases(arguments, releases):
    assert planned_releases(*arguments) == releases


@pytest.mark.parametrize(
    ("epochs", "steps", "message"),
    [
        (None, None, "exactly one of epochs and steps"),
        (1, 1, "exactly one of epochs and steps"),
        (0, None, "epochs must be a positive integer, got 0"),
        (None, 1.5, "steps must be a positive integer, got 1.5"),
    ],
)
def test_bad_lengths(epochs, steps, message):
    with pytest.raises(ValueError, match=message):
        planned_releases(epochs, steps, 10, "poisson")
