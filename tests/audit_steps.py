"""Small correct steps for the audits, in numpy, and their faulty twins.

Each is an AuditedStep: plain, with adaptive clipping, with selection by label group, with several views of an
example, as it must be and with switches for the ways in which it goes wrong. They judge the audits; the
product's own steps are judged in test_auditing.py, test_auditing_adaptive.py and test_planted_faults.py.
"""

import numpy as np

from adaclip.accounting import create_accountant
from adaclip.auditing import Released


class PlainStep:
    """Poisson sampling, flat clipping, Gaussian noise. noise: what is added, as a multiple of what is claimed."""

    def __init__(self, gradients, rng, *, q=0.1, sigma=2.0, norm=1.0, noise=1.0):
        self.gradients, self.rng = gradients.astype(np.float64), rng
        self.sample_rate, self.sigma, self.norm, self.noise = q, sigma, norm, noise
        self.denominator = q * len(gradients)
        self.accountant = create_accountant("rdp")

    def epsilon(self, delta):
        return self.accountant.get_epsilon(delta)

    def draw(self):
        return self.rng.random(len(self.gradients)) < self.sample_rate

    def clip(self, rows, norm):
        lengths = np.linalg.norm(rows, axis=1)
        return (rows * np.minimum(1.0, norm / np.maximum(lengths, 1e-300))[:, None]).sum(0)

    def normal(self, std):
        return self.noise * std * self.rng.standard_normal(self.gradients.shape[1])

    def book(self, total):
        self.accountant.step(self.sample_rate, total)

    def __call__(self):
        sampled = self.draw()
        total = self.clip(self.gradients[sampled], self.norm) + self.normal(self.sigma * self.norm)
        self.book(self.sigma)
        return Released(total / self.denominator, sampled, self.norm, self.sigma, self.sigma)


class AdaptiveStep(PlainStep):
    """The threshold follows a noisy quantile (Andrew et al. 2021, arXiv 1905.03871).

    fault: "unscaled" (the noise does not follow C_t), "stale" (the noise is that of C_{t-1}), "raw quantile".
    """

    def __init__(self, gradients, rng, *, q=0.1, sigma=2.0, norm=0.1, sigma_b=3.0, fault=None):
        super().__init__(gradients, rng, q=q, sigma=sigma, norm=norm)
        self.sigma_b, self.fault, self.last = sigma_b, fault, norm
        self.total = (sigma**-2 + (2 * sigma_b) ** -2) ** -0.5

    def __call__(self):
        sampled = self.draw()
        rows, norm = self.gradients[sampled], self.norm
        scale = {"unscaled": 0.1, "stale": self.last}.get(self.fault, norm)
        gradient = (self.clip(rows, norm) + self.normal(self.sigma * scale)) / self.denominator
        centered = (np.linalg.norm(rows, axis=1) <= norm).sum() - 0.5 * len(rows)
        if self.fault != "raw quantile":
            centered += self.sigma_b * self.rng.standard_normal()
        below = 0.5 + centered / self.denominator
        self.last, self.norm = norm, norm * np.exp(-0.2 * (below - 0.5))
        self.book(self.total)
        return Released(gradient, sampled, norm, self.sigma, self.total, {"the quantile": below})


class SelectionStep(PlainStep):
    """Releases which label group has the smallest gradients, by noisy sums and counts.

    fault: "raw argmin".
    """

    def __init__(self, gradients, rng, *, groups=4, sigma_s=10.0, fault=None, **options):
        super().__init__(gradients, rng, **options)
        self.groups, self.sigma_s, self.fault = groups, sigma_s, fault
        self.labels = np.arange(len(gradients)) % groups
        self.total = (self.sigma**-2 + 2 * sigma_s**-2) ** -0.5

    def __call__(self):
        released = super().__call__()
        rows, labels = self.gradients[released.sampled], self.labels[released.sampled]
        lengths = np.minimum(np.linalg.norm(rows, axis=1), self.norm) / self.norm
        sums = np.bincount(labels, lengths, self.groups).astype(float)
        counts = np.bincount(labels, minlength=self.groups).astype(float)
        if self.fault != "raw argmin":
            sums += self.sigma_s * self.rng.standard_normal(self.groups)
            counts += self.sigma_s * self.rng.standard_normal(self.groups)
        selected = int((sums / np.maximum(counts, 1.0)).argmin())
        return Released(
            released.gradient,
            released.sampled,
            self.norm,
            self.sigma,
            self.total,
            {"the selected group": selected},
        )

    def book(self, total):
        super().book(self.total)


class ViewsStep(PlainStep):
    """Averages several views of an example and clips once. per_view: clips each view (the fault)."""

    def __init__(self, gradients, rng, *, views=3, per_view=False, **options):
        super().__init__(gradients, rng, **options)
        self.views, self.per_view = views, per_view

    def clip(self, rows, norm):
        # Views that differ by what cancels in their mean.
        shifts = np.linspace(-0.1, 0.1, self.views)
        views = [rows * (1 + shift) for shift in shifts]
        if self.per_view:
            return sum(super(ViewsStep, self).clip(view, norm) for view in views)
        return super().clip(sum(views) / self.views, norm)
