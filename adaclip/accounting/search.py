"""One direction of a composition, composed along plans: whole, or small and large losses apart."""

from __future__ import annotations

import math

import numpy as np

from adaclip.accounting.atoms import Atoms, discretize
from adaclip.accounting.course import find_course
from adaclip.accounting.jumps import ComposedJumps
from adaclip.accounting.mixtures import Mixtures
from adaclip.accounting.plan import Draft, Plan, Target
from adaclip.accounting.smooth import Smooth, factors
from adaclip.accounting.terms import Terms
from adaclip.accounting.transform import Composed

_REPRESENTATIVES = 16


class Sum:
    """The parts of a composition, whose δ(ε) add up."""

    def __init__(self, parts: list[Composed], floor: float = 0.0) -> None:
        """``floor``: a part that is left out contributes nothing from this ε on, and anything below it."""
        self._parts, self._floor = parts, floor

    @property
    def upper(self) -> bool:
        """Which bound."""
        return self._parts[0].upper

    @property
    def damping(self) -> float:
        """The largest τ² of the parts."""
        return max(part.contour.tau**2 for part in self._parts)

    def delta(self, epsilon: float) -> tuple[float, float]:
        """(bound on δ(ε), its derivative), as ``Composed.delta``."""
        values = [part.delta(epsilon) for part in self._parts]
        if self.upper and epsilon < self._floor:
            return 1.0, sum(slope for _, slope in values)
        return min(sum(value for value, _ in values), 1.0), sum(slope for _, slope in values)

    def bend(self, epsilon: float) -> float:
        """1 − δ''/δ' at ε: damping by τ moves ε by τ²/2 times this, either way. Not certified."""
        slope = sum(part.delta(epsilon)[1] for part in self._parts)
        curvature = sum(part.curvature(epsilon) for part in self._parts)
        bend = 1.0 - curvature / slope if slope < 0.0 else 0.0
        return bend if bend > 1.0 else self._parts[-1].contour.s

    def strain(self, epsilon: float, delta: float) -> float:
        """How much larger than δ the transform is, as a logarithm."""
        return max(part.log_scale(epsilon) for part in self._parts) - math.log(delta)


class Search:
    """One direction of a composition: its coarse picture, and certified transforms along plans.

    Attributes:
        bend, epsilon, spread: the saddle point's s and ε, and the standard deviation of the tilted loss.
        representatives: (law, counts) that stand for all where there are many different events, else None.
    """

    def __init__(self, terms: Terms, swapped: bool, delta: float) -> None:
        self._terms, self._swapped, self._delta = terms, swapped, delta
        mixtures, counts = terms.mixtures, terms.counts
        self._group = np.arange(len(counts))
        self.representatives: tuple[Mixtures, np.ndarray] | None = None
        if mixtures is not None and len(counts) > _REPRESENTATIVES:
            self._group = _similar(mixtures)
            middle = [_middle(mixtures.mu, self._group == g) for g in range(self._group.max() + 1)]
            mixtures = mixtures.take(np.array(middle))
            counts = np.bincount(self._group, weights=counts)
            self.representatives = mixtures, counts
        self._law, self._counts = mixtures, counts
        self._loss: float | None = None
        self._threshold: np.ndarray | None = None
        self._drafts = [self._draft("whole", None)]
        self.bend, self.epsilon, self.spread = self._drafts[0].saddle()

    def _draft(self, part: str, threshold: np.ndarray | None) -> Draft:
        fixed = [(high, n) for high, _, n in self._terms.fixed]
        return Draft(
            self._law, self._counts, fixed, self._terms.gauss, self._swapped, self._delta, part, threshold
        )

    @property
    def draft(self) -> Draft:
        """The coarse picture of the whole."""
        return self._drafts[0]

    def delta_at(self, epsilon: float) -> float:
        """The saddle point's approximation of δ(ε)."""
        return self._drafts[0].delta_at(epsilon)

    def should_split(self, loss: float) -> bool:
        """Whether ``split`` there has a use: mixtures have unbounded losses when an example is removed."""
        if self._law is None or self._swapped:
            return False
        return self._loss is None or not 0.6 < loss / self._loss < 1.6

    def split(self, loss: float) -> None:
        """From now on compose losses up to ``loss`` and larger ones apart."""
        self._loss = loss
        grid = np.linspace(*Draft.ends(self._law, self._counts, self._delta), 400).T
        losses = self._law.loss(self._law.log_w(grid))
        threshold = np.array([np.interp(loss, row, y) for row, y in zip(losses, grid, strict=True)])
        threshold = np.clip(threshold, grid[:, 5], grid[:, -5])
        self._threshold = threshold
        self._drafts = [self._draft("small", threshold), self._draft("jumps", threshold)]

    def smooth(self, epsilon: float, accuracy: float) -> Smooth | None:
        """The composition by exact moment functions, if these fall fast enough, for ``accuracy`` in ε."""
        if self._law is None or self._terms.fixed:
            return None
        course = find_course(self.draft, self._swapped, epsilon, math.log(self._delta), accuracy)
        if course is None:
            return None
        law, counts = self._terms.mixtures, self._terms.counts
        out = Smooth(course)
        out.add(factors(course.place(law), course), counts)
        out.add_gaussian(self._terms.gauss)
        out.add_overflow(self._terms.overflow)
        return out

    def compose(self, epsilon: float, target: Target, *, rough: bool = False) -> tuple[Sum, Sum]:
        """(lower, upper) near ε; ``rough`` takes the representatives for all, and certifies nothing."""
        drafts, floor = self._drafts, 0.0
        if self._threshold is not None and not (self._terms.gauss or self._terms.fixed):
            # Small losses cannot add up to more than this, and often not to ε.
            law, threshold = self._terms.mixtures, self._threshold[self._group]
            most = float(self._terms.counts @ law.loss(law.log_w(threshold[:, None]))[:, 0]) * (1.0 + 1e-9)
            if most < 0.95 * epsilon:
                drafts, floor = drafts[1:], most
        parts = [self._compose(draft, draft.plan(epsilon, target), rough) for draft in drafts]
        return Sum([lower for lower, _ in parts], floor), Sum([upper for _, upper in parts], floor)

    def _compose(self, draft: Draft, plan: Plan, rough: bool) -> tuple[Composed, Composed]:
        jumps = draft.part == "jumps"
        make = ComposedJumps if jumps else Composed
        lower, upper = make(plan.contour, upper=False), make(plan.contour, upper=True)
        for composed in (lower, upper):
            composed.add_gaussian(self._terms.gauss)
        if draft.part != "small":
            lower.add_overflow(self._terms.overflow)
            upper.add_overflow(self._terms.overflow)
        if self._law is not None:
            law, counts, edges = self._law, self._counts, draft.edges(plan)
            if not rough:
                law, counts, edges = self._terms.mixtures, self._terms.counts, [e[self._group] for e in edges]
            small = discretize(law, edges[0], first=not self._swapped, last=draft.part == "whole")
            large = discretize(law, edges[1], first=False) if jumps else None
            for i, composed in enumerate((upper, lower)):
                if large is not None:
                    composed.add_split(small[i], large[i], counts)
                else:
                    composed.add(self._turned(small[i]), counts)
        for above, below, count in self._terms.fixed:
            upper.add(self._turned(above), np.array([count]))
            if below is not None:
                lower.add(self._turned(below), np.array([count]))
        return lower, upper

    def _turned(self, atoms: Atoms) -> Atoms:
        return atoms.swapped() if self._swapped else atoms


def _similar(law: Mixtures) -> np.ndarray:
    """[E] numbers of groups of events with about the same rate and shift; an outlier is a group of its own."""
    place = np.log(np.stack([law.q, law.mu], axis=1))
    width = 0.05
    while True:
        _, group = np.unique(np.round(place / width), axis=0, return_inverse=True)
        if group.max() < _REPRESENTATIVES:
            return group.reshape(-1)
        width *= 1.5


def _middle(mu: np.ndarray, members: np.ndarray) -> int:
    """The member with the median shift."""
    rows = members.nonzero()[0]
    return int(rows[np.argsort(mu[rows], kind="stable")[len(rows) // 2]])
