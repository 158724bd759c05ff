"""Two-sided discretization of a Poisson-subsampled Gaussian step, with no grid.

One step's dominating pair has the likelihood ratio u = 1 − q + q·w(y) (see ``mixtures``). The noise axis y is cut into cells; with Q(cell),
the conditional mean w̄ = P(cell)/Q(cell) and the values w at the cell's ends,

* **lower**: all of Q(cell) at w̄. It is what an attacker knows who sees only the cell, so the pair of atomic
  laws is dominated by the true pair (data processing). The last cell is left out, which only lowers it further;
* **upper**: Q(cell) split between the two ends so that Q and P keep their masses. Every hockey-stick
  divergence is an expectation of a convex function of u, so this only raises it ("connect the dots",
  Doroshenko et al. 2022, arXiv 2207.04380). What lies beyond the last end becomes P-mass at an infinite loss.

Both are exchangeable: swapping P and Q (the direction that adds an example) swaps the masses and negates the
losses.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from adaclip.accounting.gaussian import log_cell_masses
from adaclip.accounting.mixtures import EPS, Mixtures, loss_rounding


class Atoms(NamedTuple):
    """Laws of E events on at most n atoms each.

    Attributes:
        log_mass: [E, n] logarithm of the Q-mass.
        loss: [E, n] privacy loss log u. The P-mass is exp(log_mass + loss).
        error: [E, n] bound on the relative rounding error of each atom's mass.
        moved: [E, n] bound on the rounding error of each loss.
        bent: [E, n] rounding that moves mass between neighboring atoms: relative error of E[e^{sL}], over s².
        infinite: [E] P-mass at infinite loss.
        left_out: [E] Q-mass of the first cell, where that is no part of the law.
    """

    log_mass: np.ndarray
    loss: np.ndarray
    error: np.ndarray
    moved: np.ndarray
    bent: np.ndarray
    infinite: np.ndarray
    left_out: np.ndarray

    def swapped(self) -> Atoms:
        """The other direction: P and Q exchanged.

        What was left out lies at infinite loss then; what lay there, at −∞, where it counts for nothing.
        """
        return Atoms(
            self.log_mass + self.loss,
            -self.loss,
            self.error + self.moved,
            self.moved,
            self.bent,
            self.left_out,
            self.infinite,
        )


def discretize(
    law: Mixtures, edges: np.ndarray, *, first: bool = True, last: bool = True
) -> tuple[Atoms, Atoms]:
    """(upper, lower) laws for cells with these inner ends, or for a part of them.

    Args:
        law: E events.
        edges: [E, m] ends of the cells in units of the noise, strictly increasing along a row; the first cell
            begins at −∞, the last one ends at +∞.
        first, last: whether these two cells belong to the part.
    """
    rows = len(edges)
    far = np.full((rows, 1), np.inf)
    log_q, log_p = log_cell_masses(edges), law.log_p(edges)
    mine = np.ones(log_q.shape[1], dtype=bool)
    mine[0], mine[-1] = first, last
    log_mean, log_edge = log_p - log_q, law.log_w(edges)
    loss_floor = law.floor[:, None]
    edge_loss, mean_loss = law.loss(log_edge), law.loss(log_mean)

    # Rounding. A tail is known to `tail` relative; as masses are differences of tails, its error moves mass from
    # one cell to the next, which e^{sL} sees as its change between them: by Abel's summation s²·(slope of L) per
    # unit of mass, the hazard of a tail being at least 0.8. What is left is local: logarithms of this size.
    top = law.top[:, None]
    reach = np.abs(np.concatenate([edges[:, :1], edges], 1)) + top
    tail = EPS * (8.0 + reach * reach)
    local = EPS * (16.0 + 2.0 * np.abs(log_q) + 2.0 * np.abs(log_p)) + law.weight_rounding
    share = -np.expm1(np.minimum(loss_floor - mean_loss, 0.0))
    bent = 16.0 * tail * top * share

    moved = loss_rounding(law, log_mean, mean_loss, local)
    kept = mine.copy()
    kept[-1] = False
    lower = Atoms(
        log_q[:, kept],
        mean_loss[:, kept],
        local[:, kept],
        moved[:, kept],
        bent[:, kept],
        np.zeros(rows),
        np.zeros(rows),
    )

    # Shares of each cell's Q-mass that go to its right and its left end.
    below = np.concatenate([np.full((rows, 1), -np.inf), log_edge], 1)
    above = np.concatenate([log_edge, far], 1)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        span = above - below
        up, down = log_mean - below, above - log_mean
        to_right = np.where(np.isinf(span), np.exp(-down), np.expm1(up) / np.expm1(span))
        to_left = np.where(np.isinf(span), -np.expm1(-down), np.expm1(-down) / np.expm1(-span))
        # A mean known to `error` may leave its cell by rounding: it lies in it in truth.
        log_part = np.where(mine, log_q, -np.inf)
        log_right = log_part + np.log(np.clip(to_right, 0.0, 1.0))
        log_left = log_part + np.log(np.clip(to_left, 0.0, 1.0))
        slip = local + 8.0 * EPS * np.abs(np.where(np.isinf(below), above, below))
        right_error = local + np.where(np.isinf(up), slip, slip / np.abs(up))
        left_error = local + np.where(np.isinf(down), slip, slip / np.abs(down))
        log_infinite = (
            np.log(law.q) + log_part[:, -1] + log_edge[:, -1] + np.log(np.expm1(np.maximum(up[:, -1], 0.0)))
        )
    log_right[:, -1], log_left[:, -1] = -np.inf, log_part[:, -1]
    with np.errstate(invalid="ignore"):
        log_mass = np.concatenate([log_left[:, :1], np.logaddexp(log_right[:, :-1], log_left[:, 1:])], 1)
    mass_error = np.concatenate([left_error[:, :1], np.maximum(right_error[:, :-1], left_error[:, 1:])], 1)
    upper = Atoms(
        log_mass,
        np.concatenate([loss_floor, edge_loss], 1),
        mass_error,
        np.concatenate(
            [
                8.0 * EPS * np.abs(loss_floor),
                loss_rounding(law, log_edge, edge_loss, law.log_w_rounding(edges)),
            ],
            1,
        ),
        np.concatenate([bent[:, :1], np.maximum(bent[:, :-1], bent[:, 1:])], 1),
        np.exp(log_infinite) * (1.0 + 1e-6) + (1e-300 if last else 0.0),
        np.zeros(rows) if first else np.exp(log_q[:, 0]) * (1.0 + 1e-6) + 1e-300,
    )
    return upper, lower
