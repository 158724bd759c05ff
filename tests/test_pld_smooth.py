"""Exact moment functions: each error term against what it bounds, and bounds that hold along bad courses too."""

import math

import mpmath
import numpy as np
import pld_reference as reference
import pytest
from mpmath import mp, mpf
from pld_checks import CLOSE, EXACT, events, sampled

from adaclip.accounting.chernoff import Chernoff
from adaclip.accounting.decay import Decay
from adaclip.accounting.mixtures import EPS, Mixtures, loss_rounding
from adaclip.accounting.quadrature import _WEIGHTS, Bounds, Rule, _gauss, choose, coarse, ends, place
from adaclip.accounting.releases import Event, SubsampledGaussian
from adaclip.accounting.search import Search
from adaclip.accounting.smooth import Smooth, factors
from adaclip.accounting.terms import collect


def mixture(q, sigma, size=1):
    return collect(events((q, sigma, 2)), "add_remove", 1e-5, size).mixtures


def random_law(rng):
    return mixture(10.0 ** rng.uniform(-4.0, -0.05), 0.3 * 60.0 ** rng.random(), int(rng.integers(1, 4)))


def u_of(law):
    """u(y) in mpmath, complex y."""
    q, mu = mpf(float(law.q[0])), mpf(float(law.mu[0]))
    weights = [mpmath.exp(mpf(float(w))) for w in law.log_weights[0]]

    def u(y):
        w = sum(c * mpmath.exp(j * mu * y - (j * mu) ** 2 / 2) for j, c in enumerate(weights, 1))
        return 1 - q + q * w

    return u


def density(y):
    return mpmath.exp(-y * y / 2) / mpmath.sqrt(2 * mpmath.pi)


@pytest.mark.parametrize("size", [2, 3, 7, 16, 33, 64, 95, 96])
def test_nodes_and_weights(size):
    """Weights to their stated rounding: those of the usual formula are off by thousands of eps at the ends."""
    nodes, weights = _gauss(size)
    assert (np.diff(nodes) > 0.0).all()
    with mp.workdps(40):
        for node, weight in list(zip(nodes.tolist(), weights.tolist(), strict=True))[: (size + 1) // 2]:
            t = 2 * mpf(node) - 1
            for _ in range(3):
                below, p = mpf(1), t
                for k in range(1, size):
                    below, p = p, ((2 * k + 1) * t * p - k * below) / (k + 1)
                slope = size * (t * p - below) / (t * t - 1)
                t -= p / slope
            assert abs((1 + t) / 2 - mpf(node)) <= EPS
            assert abs(weight * (1 - t * t) * slope**2 - 1) <= _WEIGHTS * EPS
    assert weights == pytest.approx(weights[::-1], rel=1e-14)


def error(law, low, high, rule, a, omega):
    return Bounds(law, low, high, rule).log_error(a, omega)


def test_quadrature_is_within_its_error():
    """Few nodes, so that the error is far above rounding."""
    rng = np.random.default_rng(1)
    seen = []
    with mp.workdps(20):
        for _ in range(24):
            law = random_law(rng)
            low, high = ends(law, -4.0, 4.0)
            a = rng.uniform(1.0, 6.0) if rng.random() < 0.5 else rng.uniform(-8.0, 0.0)
            omega = rng.uniform(0.0, 4.0) / (1.0 + float(law.mu[0]))
            panels = math.ceil(float(high[0] - low[0]) / 2.0)
            top = 1.4 / (0.5 * float(high[0] - low[0]) / panels * float(law.top[0]))
            ellipse = min(top + math.sqrt(top * top + 1.0), rng.uniform(2.0, 6.0))
            rule = Rule.of(np.full(panels, int(rng.integers(2, 9))), np.full(panels, ellipse))
            nodes = place(law, low, high, rule)
            got = np.exp(nodes.log_mass + (a + 1j * omega) * nodes.loss).sum()
            u, power = u_of(law), mpmath.mpc(a, omega)
            cuts = [
                mpf(float(low[0])) + k * (mpf(float(high[0])) - mpf(float(low[0]))) / 24 for k in range(25)
            ]
            truth = mpmath.quad(lambda y, u=u, power=power: density(y) * u(y) ** power, cuts, maxdegree=4)
            off, bound = abs(complex(truth) - got), math.exp(float(error(law, low, high, rule, a, omega)[0]))
            assert off <= bound + 1e-13 * abs(got)
            seen.append(off / bound)
    assert max(seen) > 1e-3  # the bound says something


@pytest.mark.parametrize("seed", range(12))
def test_quadrature_error_is_that_of_bernsteins_ellipse(seed):
    """(half width)·(64/15)·M·ρ^{−2N}/(1 − ρ^{−2}) with M from the ellipse itself."""
    rng = np.random.default_rng(seed)
    law = random_law(rng) if seed > 3 else mixture(1e-3, 40.0 + seed)
    # The first ones are easy: M is at the ellipse's top, where the bound takes it, too.
    low, high = (np.array([-1.0]), np.array([1.0])) if seed <= 3 else ends(law, -3.0, 2.0)
    panels = 1 if seed <= 3 else math.ceil(float(high[0] - low[0]) / 2.0)
    half = 0.5 * float(high[0] - low[0]) / panels
    top = rng.uniform(0.3, 1.0) * 1.57 / (half * float(law.top[0]))
    rho = min(top + math.sqrt(top * top + 1.0), rng.uniform(2.0, 5.0))
    a, omega = rng.uniform(-9.0, 9.0), rng.uniform(0.0, 30.0) * float(law.mu[0] < 1.0)
    size = int(rng.integers(2, 12))
    total, u = 0.0, u_of(law)
    turn = np.linspace(0.0, 2.0 * math.pi, 97)
    for p in range(panels):
        center = float(low[0]) + half * (2 * p + 1)
        most = 0.0
        for t in turn.tolist():
            z = center + half * (rho * np.exp(1j * t) + np.exp(-1j * t) / rho) / 2
            y = mpmath.mpc(z.real, z.imag)
            most = max(most, float(abs(density(y) * u(y) ** mpmath.mpc(a, omega))))
        total += half * (64 / 15) * most * rho ** (-2 * size) / (1 - rho**-2)
    rule = Rule.of(np.full(panels, size), np.full(panels, rho))
    bound = math.exp(float(error(law, low, high, rule, a, omega)[0]))
    assert bound >= total * (1 - 1e-9)
    if seed <= 3:
        assert bound <= 1.9 * total


def test_beyond_a_right_angle_nothing_is_claimed():
    law = mixture(0.1, 0.5, 3)
    low, high = np.array([-1.0]), np.array([1.0])
    # θ = kμ·height = 6·(ρ − 1/ρ)/2
    assert np.isinf(error(law, low, high, Rule.of(np.array([90]), np.array([1.7])), 1.0, 1.0))
    assert np.isfinite(error(law, low, high, Rule.of(np.array([90]), np.array([1.2])), 1.0, 1.0))


@pytest.mark.parametrize("seed", range(10))
def test_chosen_rules_meet_their_tolerance(seed):
    rng = np.random.default_rng(seed)
    law = random_law(rng)
    low, high = ends(law, -7.0, 7.0)
    a, omega, tolerance = (
        rng.uniform(-20.0, 20.0),
        rng.uniform(0.0, 20.0),
        np.array([rng.uniform(-60.0, 0.0)]),
    )
    rule = choose(law, low, high, a, omega, tolerance)
    assert rule is not None
    assert np.exp(rule.log_weights).sum() == pytest.approx(1.0, rel=1e-13)
    assert error(law, low, high, rule, a, omega)[0] <= tolerance[0]


def modulus(law, low, high, a, omega):
    """|E_Q[u^{a + iω}]|/E_Q[u^a] between the ends for each ω, by very many nodes."""
    x, weights = np.polynomial.legendre.leggauss(20)
    panels = 600
    nodes = ((np.arange(panels)[:, None] + 0.5 * (x + 1.0)) / panels).ravel()
    y = low + (high - low) * nodes[None]
    loss = law.loss(law.log_w(y))[0]
    log_mass = a * loss - 0.5 * y[0] ** 2
    mass = np.exp(log_mass - log_mass.max()) * np.tile(weights, panels)
    return np.abs(np.exp(1j * np.outer(omega, loss)) @ mass) / mass.sum()


LAWS = [
    (0.01, 1.0, 1, 3.0),
    (0.3, 4.0, 1, 9.0),
    (0.3, 0.5, 1, -2.0),
    (0.9, 2.0, 2, 2.0),
    (0.05, 20.0, 3, 40.0),
]
LAWS += [(1e-3, 0.4, 1, 1.5), (0.999, 0.3, 1, 1.2), (0.5, 10.0, 1, -30.0), (1e-4, 0.1, 1, 1.1)]


@pytest.mark.parametrize("case", LAWS, ids=str)
def test_no_higher_frequency_is_above_the_decay_bound(case):
    q, sigma, size, a = case
    law = mixture(q, sigma, size)
    low, high = ends(law, -8.0, 8.0)
    nodes = place(law, low, high, coarse(law, low, high))
    decay = Decay.of(law, low, high, a, nodes.tilted(a)[1])
    weights = nodes.tilted(a)[0]
    mean = (weights * nodes.loss).sum()
    spread = math.sqrt(float((weights * (nodes.loss - mean) ** 2).sum()))
    grid = np.exp(np.linspace(math.log(0.05), math.log(60.0), 120)) / spread
    size = modulus(law, low[0], high[0], a, grid)
    bounds = np.array([1.0 - float(decay.deficit(omega)[0]) for omega in grid])
    largest_beyond = np.maximum.accumulate(size[::-1])[::-1]
    assert (largest_beyond <= bounds + 1e-9).all()
    assert bounds.min() < 0.9 or sigma < 0.5  # rare losses: nearly all of the law is nearly one atom


def test_decay_is_nearly_what_a_box_has():
    """Level sets of nearly equal heights: then the bound is 2/(ωx), and |sin(ωx/2)|/(ωx/2) comes up to it."""
    law = mixture(0.5, 200.0)
    low, high = np.array([-0.02]), np.array([0.02])
    nodes = place(law, low, high, coarse(law, low, high))
    decay = Decay.of(law, low, high, 2.0, nodes.tilted(2.0)[1])
    length = float(np.diff(law.loss(law.log_w(np.array([[low[0], high[0]]]))))[0, 0])
    for lobe in (1, 2, 5):
        omega = (2 * lobe + 1) * math.pi / length
        bound = 1.0 - float(decay.deficit(omega)[0])
        true = modulus(law, low[0], high[0], 2.0, np.array([omega]))[0]
        assert true <= bound <= true * 1.01 + 0.001


def smooth_of(steps, delta, swapped, size=1, accuracy=CLOSE):
    terms = collect(steps, "add_remove", delta, size)
    search = Search(terms, swapped, delta)
    smooth = search.smooth(search.epsilon, accuracy * search.epsilon)
    assert smooth is not None
    return terms, search, smooth


SMOOTH = [
    ((0.01, 0.8, 1_000), 1e-5, 1),
    ((256 / 60000, 1.1, 14_000), 1e-12, 1),
    ((4096 / 50000, 3.0, 2_500), 1e-15, 1),
    ((0.5, 10.0, 1_000), 1e-5, 1),
    ((0.1, 5.0, 300), 1e-10, 1),
    ((0.2, 3.0, 200), 1e-6, 3),
    ((0.02, 1.0, 2_000), 1e-5, 2),
]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_bounds_are_around_the_reference(case, swapped):
    step, delta, size = case
    _, search, smooth = smooth_of(events(step), delta, swapped, size)
    release = reference.sampled_group(*step[:2], size)
    digits = 20 if delta < 1e-11 else None
    with mp.workdps(25):
        truth = reference.epsilon_one_way([(release, step[2])], delta, reverse=swapped, digits=digits)
    lower, upper = smooth.epsilon_bounds(delta, search.epsilon)
    assert lower * (1 - EXACT) <= float(truth) <= upper * (1 + EXACT)
    assert upper - lower <= CLOSE * upper


def test_gaussian_releases_and_overflow():
    """Truncated batches add (1 + e^ε)·overflow to δ either way; full ones multiply the moment function."""
    overflow, delta = 1e-11, 1e-5
    release = SubsampledGaussian(0.05, 2.0, "truncated_poisson", overflow)
    steps = [Event(release, 500), *events((1.0, 10.0, 4), (0.01, 1.0, 300))]
    known = sampled((0.05, 2.0, 500), (1.0, 10.0, 4), (0.01, 1.0, 300))
    for swapped in (False, True):
        _, search, smooth = smooth_of(steps, delta, swapped)
        contour = reference.Contour(known, reverse=swapped, epsilon=search.epsilon)
        for epsilon in (0.8 * search.epsilon, search.epsilon, 1.1 * search.epsilon):
            truth, more = float(contour.delta(epsilon)), 500 * overflow * (1.0 + math.exp(epsilon))
            lower, upper = (smooth.delta(epsilon, upper=upper)[0] for upper in (False, True))
            assert lower <= (truth - more) * (1 + 1e-10) < (truth + more) * (1 - 1e-10) <= upper
            assert upper - lower <= 2.0 * more + 1e-3 * max(truth, delta)


def with_contour(course, **changes):
    return course._replace(contour=course.contour._replace(**changes))


def bad_courses(course):
    """Worse in one way each, so that one error term is most of the distance between the bounds."""
    contour, rule = course.contour, course.rule
    for share in (0.75, 0.5, 0.3, 0.15):
        yield "cut", with_contour(course, count=max(int(contour.count * share), 3))
    for share in (0.6, 0.45, 0.3):
        yield (
            "alias",
            with_contour(course, window=contour.window * share, count=int(contour.count * share) + 1),
        )
    for less in (6, 12, 18):
        yield "rule", course._replace(rule=Rule.of(np.maximum(rule.sizes - less, 4), rule.ellipses))
    for less in (0.7, 1.2, 2.0):
        yield "far", course._replace(far=course.far - less)
        yield "bottom", course._replace(bottom=course.bottom + less)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("case", [SMOOTH[0], SMOOTH[3], SMOOTH[5]], ids=str)
def test_bad_courses_are_never_wrong(case, swapped):
    step, delta, size = case
    terms, search, smooth = smooth_of(events(step), delta, swapped, size)
    contour = reference.Contour(
        [(reference.sampled_group(*step[:2], size), step[2])], reverse=swapped, epsilon=search.epsilon
    )
    telling = dict.fromkeys(("cut", "alias", "rule", "far", "bottom"), 0)
    for name, course in bad_courses(smooth.course):
        other = Smooth(course)
        other.add(factors(course.place(terms.mixtures), course), terms.counts)
        for epsilon in (0.9 * search.epsilon, search.epsilon, 1.05 * search.epsilon):
            truth = float(contour.delta(epsilon))
            lower, upper = (other.delta(epsilon, upper=upper)[0] for upper in (False, True))
            assert lower <= truth * (1 + 1e-10), name
            assert truth * (1 - 1e-10) <= upper, name
            # More than the good course's error by far, and not all there is.
            telling[name] += 1e-6 * upper < upper - lower < 0.99 * upper
    assert all(n > 0 for name, n in telling.items() if name not in ("rule",)), telling


@pytest.mark.parametrize("fewer", [0, 5, 10])
@pytest.mark.parametrize("swapped", [False, True])
def test_moment_functions_along_a_course(swapped, fewer):
    """The factors themselves, at some frequencies, against mpmath, and what is left out; with fewer nodes, too."""
    step = (0.02, 1.2, 800)
    terms, _, smooth = smooth_of(events(step), 1e-8, swapped)
    course = smooth.course
    rule = Rule.of(np.maximum(course.rule.sizes - fewer, 2), course.rule.ellipses)
    course = course._replace(rule=rule)
    one = factors(course.place(terms.mixtures), course)
    low, high = ends(terms.mixtures, course.bottom, course.far)
    omega = course.contour.frequencies()
    u = u_of(terms.mixtures)
    with mp.workdps(25):
        cuts = [mpf(float(low[0])) + k * (mpf(float(high[0])) - mpf(float(low[0]))) / 30 for k in range(31)]
        for j in (0, 1, len(omega) // 3, len(omega) - 1):
            s = mpmath.mpc(course.contour.s, float(omega[j]))
            power = 1 - s if swapped else s
            truth = mpmath.quad(lambda y, power=power: density(y) * u(y) ** power, cuts, maxdegree=5)
            ratio = complex(truth * mpmath.exp(-mpf(float(one.log_total[0]))))
            off = abs(ratio - np.exp(one.log_values[0, j]))
            assert off <= one.errors[0, j] * math.exp(one.log_bounds[0, j])
            assert abs(ratio) <= math.exp(one.log_bounds[0, j]) * (1 + 1e-12)
            if j == 0:
                assert abs(ratio - 1.0) <= one.rounding[0]
        out = mpmath.ncdf(mpf(float(low[0]))) + mpmath.ncdf(-mpf(float(high[0])))
        if not swapped:
            q, mu = step[0], 1 / mpf(step[1])
            shifted = mpmath.ncdf(mpf(float(low[0])) - mu) + mpmath.ncdf(mu - mpf(float(high[0])))
            out = (1 - q) * out + q * shifted
        assert float(out) <= one.outside[0] <= float(out) * (1 + 1e-6)
    assert fewer or one.rounding[0] < 1e-8


@pytest.mark.parametrize("case", [*SMOOTH[:4], ((1e-4, 0.5, 50_000), 1e-6, 1)], ids=str)
def test_chernoff_is_above_the_reference(case):
    step, delta, _ = case
    gauss = 0.04
    law, counts = mixture(*step[:2]), np.array([float(step[2])])
    known = sampled(step, (1.0, 5.0, 1))
    for lost in (1e-3 * delta, 1e-4 * step[2]):
        chernoff = Chernoff.near(law, counts, 12.0, lost)
        for epsilon in (0.1, 1.0, 3.0):
            try:
                truth = float(reference.delta_one_way(known, epsilon, reverse=True))
            except ArithmeticError:
                continue
            bound = chernoff.delta(epsilon, gauss)
            assert truth * (1 - 1e-9) <= bound
            assert chernoff.delta(epsilon, gauss, 1e-9) >= bound + (1e-9 - 1e-15) * (1.0 + math.exp(epsilon))
            # s is off by at most e^{1/4} at its best, and prefactors are what is lost otherwise.
            if lost < delta and truth > 1e-9:
                assert bound <= 300.0 * truth + 2 * delta


def test_rounding_of_losses_covers_what_cancels():
    """μ = 1/σ itself, μy − μ²/2 near 0, 1 − q + q·w near 1 − q, and q·w where q is tiny."""
    rng = np.random.default_rng(5)
    with mp.workdps(60):
        for _ in range(300):
            q = float(rng.choice([1e-300, 1e-12, 1e-3, 0.4, 0.6, 1 - 1e-12, 1 - 1e-5]))
            sigma = 10.0 ** rng.uniform(-2.0, 1.5)
            law = Mixtures(np.array([q]), np.array([1.0 / sigma]), np.zeros((1, 1)))
            y = np.array([[0.5 / sigma + rng.normal() * rng.choice([1e-12, 0.1, 1.0, 5.0])]])
            log_w = law.log_w(y)
            loss = law.loss(log_w)
            mu, exact_y = 1 / mpf(sigma), mpf(float(y[0, 0]))
            true_log_w = mu * exact_y - mu * mu / 2
            true_loss = mpmath.log1p(mpf(q) * mpmath.expm1(true_log_w))
            error = law.log_w_rounding(y)
            assert abs(true_log_w - mpf(float(log_w[0, 0]))) <= error[0, 0]
            moved = loss_rounding(law, log_w, loss, error)[0, 0]
            assert abs(true_loss - mpf(float(loss[0, 0]))) <= moved * (1 + 1e-9)
