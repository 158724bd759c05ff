"""Faults to plant in the real engine, one method each: what the planted-fault tests must notice.

Each takes pytest's `monkeypatch`. With it in place the engine runs as before, and is wrong in one way.
"""

from dataclasses import replace

import torch

from adaclip.batches import LoaderBase
from adaclip.clipped_sum import ClippedSum
from adaclip.clipping import AdaptiveClipping
from adaclip.groups import LabelGroups
from adaclip.optimizer import DPOptimizer
from adaclip.step_release import Statistics


def noise_of_the_first_threshold(monkeypatch):
    """The noise does not follow C_t: it stays sigma_g C_0."""
    monkeypatch.setattr(
        AdaptiveClipping, "noise_scale", lambda self: torch.full_like(self.thresholds, self._initial)
    )


def noise_of_the_last_threshold(monkeypatch):
    """The noise is that of C_{t-1}."""

    def stale(self):
        kept = getattr(self, "_kept", self.thresholds.clone())
        self._kept = self.thresholds.clone()
        return kept

    monkeypatch.setattr(AdaptiveClipping, "noise_scale", stale)


def noise_of_the_next_threshold(monkeypatch):
    """The statistics are released, and C moves, before the gradient's noise is made: it is that of C_{t+1}."""
    noisy = DPOptimizer._stds
    release = Statistics.release

    def early(self, params):
        release(self._sum.statistics, self._source, self.releases - 1)
        return noisy(self, params)

    monkeypatch.setattr(DPOptimizer, "_stds", early)
    monkeypatch.setattr(Statistics, "release", lambda self, source, t: None)


def statistics_without_noise(monkeypatch):
    """Quantile, histogram and group sums are used as they were counted."""

    def raw(self, source, t):
        for part, sums in zip(self.parts, self._slices, strict=True):
            part.absorb(sums.clone(), t)
        self.clear()

    monkeypatch.setattr(Statistics, "release", raw)


def selection_without_noise(monkeypatch):
    """The group is selected by the raw sums, and only the report is noisy: a raw argmin."""
    absorb = LabelGroups.absorb

    def raw(self, released, t):
        absorb(self, self._sums.clone(), t)
        self._last = released.clone()

    monkeypatch.setattr(LabelGroups, "absorb", raw)


def division_by_the_realized_batch(monkeypatch):
    """The clipped sum is divided by the rows there are, not by q N."""
    accumulate = ClippedSum._accumulate

    def patched(self, used, rows):
        self._denominator = max(1, self._physical.rows)
        accumulate(self, used, rows)

    monkeypatch.setattr(ClippedSum, "_accumulate", patched)


def quantile_of_the_realized_batch(monkeypatch):
    """The indicator sum is divided by the rows there are, not by q N."""
    accumulate = ClippedSum._accumulate

    def patched(self, used, rows):
        self.clipping.side._denominator = max(1, self._physical.rows)
        accumulate(self, used, rows)

    monkeypatch.setattr(ClippedSum, "_accumulate", patched)


def clipping_per_view(monkeypatch):
    """Every view is clipped by itself, and the clipped views are averaged."""
    announce, start = LoaderBase._announce, ClippedSum.__init__

    def every_view_a_sample(self, info, labels=None):
        if info is not None:
            info = replace(info, rows=info.rows * info.views, padded_rows=info.padded_rows * info.views)
        announce(self, info, labels)

    def blind(self, *args, views, denominator, **options):
        start(self, *args, views=1, denominator=denominator * views, **options)

    monkeypatch.setattr(LoaderBase, "_announce", every_view_a_sample)
    monkeypatch.setattr(ClippedSum, "__init__", blind)


def counts_of_the_last_micro_batch(monkeypatch):
    """Statistics start anew with every physical batch, so that the last one's are released."""
    accumulate = ClippedSum._accumulate

    def patched(self, used, rows):
        self.statistics.clear()
        accumulate(self, used, rows)

    monkeypatch.setattr(ClippedSum, "_accumulate", patched)


def counts_of_padding(monkeypatch):
    """Rows of padding are counted as samples."""
    accumulate = ClippedSum._accumulate

    def patched(self, used, rows):
        self._physical = replace(self._physical, rows=self._physical.padded_rows)
        accumulate(self, used, rows)

    monkeypatch.setattr(ClippedSum, "_accumulate", patched)
