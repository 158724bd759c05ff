"""Where to evaluate exact moment functions: the contour and the quadrature for a composition.

Nothing here is part of the certificate. A bad course makes the two bounds lie further apart, never wrong.
"""

from __future__ import annotations

import math

import numpy as np

from adaclip.accounting import quadrature
from adaclip.accounting.decay import Decay
from adaclip.accounting.plan import Draft
from adaclip.accounting.smooth import Course
from adaclip.accounting.transform import Contour

_SHARE = 1e-3  # of the wanted accuracy that most errors may take; they cost only logarithms
_LOST = (
    0.02  # and that the noise left out may take: rare enormous losses forbid the tilt that the others need
)
_STRAIN = 14.0  # log of transform / δ up to which rounding is not felt
_COUNT = 2500  # frequencies
_TILTS = (1.0, 0.7, 0.5)
_OCTAVES = np.exp2(np.arange(0.0, 14.0, 0.25))


def find_course(
    draft: Draft, swapped: bool, epsilon: float, log_delta: float, accuracy: float, least: float = 1.0
) -> Course | None:
    """A course for ε near ``epsilon``; None if the moment functions fall too slowly, or rare losses hide the others.

    Args:
        draft: of representatives, with no laws but subsampled Gaussians.
        swapped: the direction that adds an example.
        log_delta: log δ.
        accuracy: wanted of ε.
        least: the share of the draft's events for which the course must do as well.
    """
    law, counts = draft.law, draft.counts
    saddle = draft.saddle_at(epsilon)
    wanted = max(accuracy * (saddle - 1.0), 1e-9)  # as a share of δ
    lost = math.exp(log_delta) * min(_LOST * wanted, 1e-4)
    bottom, far = quadrature.cuts(lost / float(counts.sum()), lost / float(counts @ law.q))
    low, high = quadrature.ends(law, bottom, far)
    nodes = quadrature.place(law, low, high, quadrature.coarse(law, low, high))
    log_share = math.log(min(_SHARE * wanted, 1e-3))
    best: tuple[Contour, np.ndarray, float] | None = None
    for tilt in _TILTS:
        s = 1.0 + (saddle - 1.0) * tilt
        height, spread = draft.height(s, epsilon) - log_delta, draft.spread(s)
        if spread == 0.0 or height + math.log(min(1.0 / spread, s)) > _STRAIN:
            break
        window, alias = draft.window(s, epsilon, log_delta + log_share)
        a = 1.0 - s if swapped else s
        log_total = nodes.tilted(a)[1]
        decay = Decay.of(law, low, high, a, log_total)
        last = _last(
            least * counts,
            least * draft.gauss,
            decay,
            1.0 / spread,
            log_share - height - math.log(s * (s - 1.0)),
        )
        if last * window > 2.0 * math.pi * _COUNT:
            continue
        contour = Contour(s, alias, window, int(last * window / (2.0 * math.pi)) + 2, 0.0)
        if best is None or contour.count < best[0].count:
            best = contour, log_total, log_share - height - math.log(min(last, s))
    if best is None:
        return None
    contour, log_total, log_error = best
    a = 1.0 - contour.s if swapped else contour.s
    tolerance = log_total + log_error - math.log(float(counts.sum()))
    rule = quadrature.choose(law, low, high, a, float(contour.frequencies()[-1]), tolerance)
    return None if rule is None else Course(contour, rule, bottom, far, swapped)


def _last(counts: np.ndarray, gauss: float, decay: Decay, start: float, log_enough: float) -> float:
    """A frequency beyond which the integrand may be left out; inf if there is none in sight."""
    for omega in start * _OCTAVES:
        log_beyond = float(counts @ np.log1p(-decay.deficit(omega))) - 0.5 * gauss * omega * omega
        if log_beyond - math.log(math.pi * omega) <= log_enough:
            return float(omega)
    return math.inf
