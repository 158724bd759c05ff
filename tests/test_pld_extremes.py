"""Where the transform is at the limits of floating point: bounds stay bounds, and nothing warns."""

import math
import warnings

import numpy as np
import pytest
from scipy.special import gammaln

from adaclip.accounting import Event, SubsampledGaussian, create_accountant, pld
from adaclip.accounting.atoms import Atoms
from adaclip.accounting.jumps import ComposedJumps, _log1p
from adaclip.accounting.transform import Contour


def atoms(masses, losses):
    """One law, exact."""
    zeros = np.zeros((1, len(masses)))
    mass, loss = np.log(np.array([masses])), np.array([losses])
    return Atoms(mass, loss, zeros, zeros, zeros, np.zeros(1), np.zeros(1))


def exact_delta(small, large, count, epsilon):
    """δ(ε) of (B + J)^T − B^T, for B on two atoms and J on one, by enumeration."""
    (low, high), (l_low, l_high) = small
    (mass,), (loss,) = large
    total = 0.0
    for jumps in range(1, count + 1):
        for up in range(count - jumps + 1):
            down = count - jumps - up
            ways = gammaln(count + 1) - gammaln(jumps + 1) - gammaln(up + 1) - gammaln(down + 1)
            log_q = ways + jumps * math.log(mass) + up * math.log(high) + down * math.log(low)
            l_all = jumps * loss + up * l_high + down * l_low
            if l_all > epsilon:
                total += math.exp(log_q) * (math.exp(l_all) - math.exp(epsilon))
    return total


@pytest.mark.parametrize("count", [1, 2, 3, 12])
@pytest.mark.parametrize("mass", [1e-17, 1e-14, 1e-9, 1e-3, 0.4])
@pytest.mark.parametrize("zero", [5, 9, 20])
def test_jumps_are_certified_where_the_small_part_vanishes(count, mass, zero):
    """Tilted by s, B has two equal atoms, and a zero at one frequency: B is rounding alone there."""
    half, s, loss = 0.2, 2.0, 3.0
    masses = [0.5 * math.exp(s * half), 0.5 * math.exp(-s * half)]
    small, large = (masses, [-half, half]), ([mass], [loss])
    epsilon = 0.9 * loss
    for tau in (0.05, 0.2):
        contour = Contour(s, 3.0, 4.0 * half * zero, 900, tau)
        bounds = []
        for upper in (False, True):
            composed = ComposedJumps(contour, upper=upper)
            composed.add_split(atoms(*small), atoms(*large), np.array([count]))
            bounds.append(composed.delta(epsilon)[0])
        exact = min(exact_delta(small, large, count, epsilon), 1.0)
        assert bounds[0] <= exact * (1 + 1e-12)
        assert exact * (1 - 1e-12) <= bounds[1]


def test_logarithm_of_one_plus_z():
    """Accurate for small z, finite for huge ones and at −1."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z = np.array([1e-300, 1e-20j, 1e-9 + 1e-9j, -0.4 + 0.2j, 0.6, 3.0 - 4.0j, 1e250 + 1e250j, -1.0])
        got = _log1p(z)
    assert got[:2].real.tolist() == pytest.approx([1e-300, 5e-41], rel=1e-14, abs=0.0)
    assert got[1].imag == 1e-20
    assert got[2] == pytest.approx(1e-9 + 1e-9j, rel=1e-8)
    assert got[3:6] == pytest.approx(np.log(1.0 + z[3:6]), rel=1e-14)
    assert got[6] == pytest.approx(math.log(2.0) / 2 + 250 * math.log(10.0) + 0.25j * math.pi)
    assert np.isfinite(got).all()


def test_a_part_of_small_losses_that_vanishes_warns_of_nothing():
    """ε is 60,000 here, and the two parts of a step's losses were divided by each other."""
    q, sigma, steps, delta = 0.7903937841227486, 0.39999616604861066, 26586, 3.5056588576972322e-12
    rdp = create_accountant("rdp")
    rdp.step(q, sigma, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lower, upper = pld.epsilon_bounds([Event(SubsampledGaussian(q, sigma), steps)], delta)
    assert lower <= upper
    assert lower <= rdp.get_epsilon(delta)
