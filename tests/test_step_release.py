"""How a step's noise multiplier is split, and the noisy release of its statistics."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from adaclip.noise import STREAM_STATISTICS, NoiseSource
from adaclip.step_release import Statistics, check_noise, gradient_sigma

KEY = bytes(range(32))
BOUNDS, SIGMAS = st.floats(0.01, 10.0), st.floats(0.05, 50.0)


class Side:
    """A side release that remembers what it is given."""

    def __init__(self, stds, bound=1.0, key="below"):
        self._key = key
        self.width = len(stds)
        self.sensitivities = ((bound, stds[0]),)
        self._stds = stds
        self.absorbed = []

    def stds(self):
        return list(self._stds)

    def outputs(self, sums):
        return {self._key: sums}

    def absorb(self, released, t):
        self.absorbed.append((t, released.clone()))


@given(SIGMAS, st.lists(st.tuples(BOUNDS, st.floats(0.05, 1e3)), max_size=4))
def test_the_split_covers_what_is_booked_and_no_more(sigma, parts):
    cost = sum((Fraction(bound) / Fraction(std)) ** 2 for bound, std in parts)
    assume(cost < 1 / Fraction(sigma) ** 2)
    found = gradient_sigma(sigma, parts)
    joint = 1 / Fraction(found) ** 2 + cost
    # In exact arithmetic: never less noise than is booked, and more by less than 1e-12 of it.
    assert joint <= 1 / Fraction(sigma) ** 2
    assert float(joint * Fraction(sigma) ** 2) ** -0.5 <= 1 + 1e-12
    total = (found**-2 + sum((bound / std) ** 2 for bound, std in parts)) ** -0.5
    assert total == pytest.approx(sigma, rel=1e-12)
    assert found >= sigma
    if not parts:
        assert found == sigma


@given(SIGMAS, st.floats(1.0000001, 100.0))
def test_the_closed_form_for_the_quantile(sigma, spare):
    sigma_b = 0.5 * sigma * spare
    expected = sigma / math.sqrt(1 - (sigma / (2 * sigma_b)) ** 2)
    assert gradient_sigma(sigma, [(0.5, sigma_b)]) == pytest.approx(expected, rel=1e-6)


@given(SIGMAS, BOUNDS, st.floats(0.01, 0.9999))
def test_a_split_that_cannot_be_met_is_refused(sigma, bound, part):
    std = part * sigma * bound
    with pytest.raises(ValueError, match="must leave something for the gradient"):
        gradient_sigma(sigma, [(bound, std)])


def test_the_refusal_names_the_least_noise_that_would_do():
    with pytest.raises(
        ValueError, match=r"noise 0\.5 for sensitivity 0\.5 takes 4 of it \(alone it must exceed 1\)"
    ):
        gradient_sigma(2.0, [(0.5, 0.5)])
    with pytest.raises(ValueError, match="the others cost too much already"):
        gradient_sigma(2.0, [(0.5, 0.5), (1.0, 40.0)])


def test_without_noise_nothing_is_split():
    assert gradient_sigma(0.0, [(0.5, 0.1)]) == 0.0


@pytest.mark.parametrize("sigma", [-1.0, math.inf, math.nan, True, "1"])
def test_bad_noise(sigma):
    for check in (check_noise, lambda s: gradient_sigma(s, [])):
        with pytest.raises((ValueError, TypeError), match="noise_multiplier must be"):
            check(sigma)


@pytest.mark.parametrize("part", [(1.0, 0.0), (1.0, -1.0), (1.0, math.inf), (math.nan, 1.0), (-1.0, 1.0)])
def test_bad_parts(part):
    with pytest.raises(ValueError, match=r"got part 1 = "):
        gradient_sigma(1.0, [(1.0, 10.0), part])


def test_statistics_are_released_with_every_parts_own_noise():
    sides = [Side([2.0, 3.0]), Side([5.0], key="histogram")]
    statistics = Statistics(sides, torch.device("cpu"))
    assert statistics.sensitivities == [(1.0, 2.0), (1.0, 5.0)]
    source = NoiseSource(KEY)
    statistics.sums.copy_(torch.tensor([10.0, 20.0, 30.0]))
    statistics.release(source, 7)
    z = source.normal_(torch.empty(3, dtype=torch.float64), 7, STREAM_STATISTICS)
    expected = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64) + z * torch.tensor([2.0, 3.0, 5.0])
    # The last digits, which noise of float32 normals does not cover, are not released.
    grid = torch.tensor([2.0, 2.0, 4.0]) / 64
    expected = (expected / grid).round() * grid
    (t, first), (_, second) = sides[0].absorbed[0], sides[1].absorbed[0]
    assert t == 7
    assert torch.equal(torch.cat([first, second]), expected)
    # A new logical batch begins with nothing, and an empty one releases noise all the same.
    assert not statistics.sums.any()
    statistics.release(source, 8)
    assert bool((sides[0].absorbed[1][1] != 0).all())
    assert not torch.equal(sides[0].absorbed[1][1], first)


def test_parts_share_one_tensor():
    statistics = Statistics([Side([1.0, 1.0], key="histogram"), Side([1.0])], torch.device("cpu"))
    statistics.outputs()["below"].fill_(4.0)
    assert statistics.sums.tolist() == [0.0, 0.0, 4.0]
    statistics.clear()
    assert not statistics.sums.any()


def test_the_sums_of_two_halves_add_up():
    # What two processes would reduce: the released values, and all that follows, are the same to the last bit.
    whole, left, right = (Statistics([Side([1.5, 2.5])], torch.device("cpu")) for _ in range(3))
    left.sums.copy_(torch.tensor([3.5, -2.0]))
    right.sums.copy_(torch.tensor([1.0, 8.5]))
    whole.sums.copy_(torch.tensor([4.5, 6.5]))
    reduced = left.sums + right.sums
    for made in (left, right):
        made.sums.copy_(reduced)
    for made in (whole, left, right):
        made.release(NoiseSource(KEY), 3)
    a, b, c = (made.parts[0].absorbed[0][1] for made in (whole, left, right))
    assert torch.equal(a, b)
    assert torch.equal(a, c)


def test_statistics_need_a_std_for_every_entry():
    side = Side([1.0, 2.0])
    side.width = 3
    with pytest.raises(ValueError, match="a std for each entry"):
        Statistics([side], torch.device("cpu"))


def test_two_parts_may_not_count_the_same():
    with pytest.raises(ValueError, match="statistics of their own"):
        Statistics([Side([1.0]), Side([1.0])], torch.device("cpu"))
