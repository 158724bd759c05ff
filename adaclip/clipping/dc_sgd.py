"""DC-SGD: the threshold is picked from a noisy histogram of the norms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from adaclip.clipping.base import Clipping, Setting, SplitRelease, check_norm
from adaclip.clipping.quantile import check_fraction

__all__ = ["DCSGDClipping"]

_CRITERIA = ("percentile", "error")
# A bin counts from this many standard deviations of its noise on. One bin of noise at 1000 C_0 would outweigh all
# others in the squared error; at 4.5 this happens in one of 7,000 steps with 40 bins.
_CLEAR = 4.5
# Half the width of the grid of thresholds, in decades around C_0.
_DECADES = 3.0


class DCSGDClipping(Clipping, SplitRelease):
    """A threshold from the norms' noisy histogram (Wei et al. 2025, DC-SGD, arXiv 2503.22988).

    Releases, beside the clipped sum (an example adds at most C_t to it), the batch's histogram of norms over
    a fixed public grid, h_t + N(0, sigma_h^2 I). An example adds 1 to one bin, so of the step's noise multiplier
    sigma the gradient keeps sigma_g = (sigma^-2 - sigma_h^-2)^(-1/2); its noise is sigma_g C_t. A sigma_h of no
    more than sigma leaves nothing and is refused before training. Where an example is replaced, two bins
    change; the ledger's law covers any two contributions of norm 1.

    The grid: `bins` bins, whose inner edges run from C_0/1000 to 1000 C_0 in equal ratios; the first bin
    reaches down to 0 and the last is open. All that follows is made of released numbers and costs nothing: a
    moving average of the histograms is divided by the public q N; bins that do not stand out of the noise are
    dropped, and the rest is projected onto the probability simplex (clamping at 0 alone would turn noise into
    mass). If no bin stands out, C stays. From these shares p comes C_{t+1}, on the grid:

    - "percentile": the norm below which the given share lies, log-linear within a bin;
    - "error": the edge C with the least sigma_g^2 C^2 d / (q N)^2 + sum_k p_k (m_k - C)_+^2, the variance of
      the noise in d trained parameters plus the mean squared length that clipping cuts off; m_k is a bin's
      geometric middle (an outer bin's edge).

    Args:
        max_grad_norm: C_0, the first threshold and the middle of the grid.
        criterion: "percentile" or "error".
        percentile: in (0, 1); not used by "error".
        bins: at least 4.
        sigma_h: noise standard deviation in every bin; None: max(8, q N / 50).
        memory: weight of the past in the moving average, in [0, 1).

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        max_grad_norm: float = 1.0,
        criterion: str = "percentile",
        percentile: float = 0.5,
        bins: int = 40,
        sigma_h: float | None = None,
        memory: float = 0.8,
    ):
        self._initial = check_norm(max_grad_norm)
        if criterion not in _CRITERIA:
            raise ValueError(f"criterion must be one of {_CRITERIA}, got {criterion!r}")
        self.criterion = criterion
        self.percentile = check_fraction(percentile, "percentile")
        if isinstance(bins, bool) or not isinstance(bins, int) or bins < 4:
            raise ValueError(f"bins must be an integer of at least 4, got {bins!r}")
        self.width = bins
        self.sigma_h = None if sigma_h is None else check_norm(sigma_h, "sigma_h")
        if isinstance(memory, bool) or not isinstance(memory, (int, float)) or not 0 <= memory < 1:
            raise ValueError(f"memory must be in [0, 1), got {memory!r}")
        self.memory = float(memory)
        self._gradient_noise = 0.0
        self.thresholds = torch.tensor([self._initial], dtype=torch.float64)

    @property
    def name(self) -> str:
        return "dc_sgd" if self.criterion == "percentile" else "dc_sgd_error"

    def bind(self, setting: Setting) -> int:
        made = {"dtype": torch.float64, "device": setting.device}
        self.thresholds = torch.tensor([self._initial], **made)
        edges = torch.linspace(-_DECADES, _DECADES, self.width - 1, dtype=torch.float64) * math.log(10.0)
        self._edges = (edges.exp() * self._initial).to(setting.device)
        # Where a bin begins and ends; the outer ones have no width, so a share in them means their edge.
        self._begin = torch.cat([self._edges[:1], self._edges]).log()
        self._end = torch.cat([self._edges, self._edges[-1:]]).log()
        middle = ((self._begin + self._end) / 2).exp()
        self._excess = (middle[None, :] - self._edges[:, None]).clamp_min(0.0).square()
        self._denominator = setting.expected_batch_size
        self._parameters = sum(setting.parameters)
        if self.sigma_h is None:
            self.sigma_h = max(8.0, self._denominator / 50)
        self._average = torch.zeros(self.width, **made)
        # How much of the average is there: 1 - memory^t.
        self._filled = 0.0
        # What follows from that and the gradient's noise, where the device reads it: the average's weight, the least
        # share that is clear of the noise, and what a threshold's square costs in noise.
        self._weight, self._least, self._cost = torch.ones(3, **made).unbind()
        self.side = self
        return 1

    def note_noise(self, noise_multiplier: float) -> None:
        self._gradient_noise = noise_multiplier

    @property
    def sensitivities(self) -> tuple[tuple[float, float], ...]:
        return ((1.0, self.sigma_h),)

    def stds(self) -> list[float]:
        return [self.sigma_h] * self.width

    def outputs(self, sums: Tensor) -> dict[str, Tensor]:
        return {"edges": self._edges, "histogram": sums}

    @torch.no_grad()
    def prepare(self, t: int) -> None:
        self._filled = self.memory * self._filled + (1 - self.memory)
        # The standard deviation of what noise is left: weights (1 - m) m^i, i < t, over their sum.
        spread = math.sqrt((1 - self.memory) / (1 + self.memory) * (1 - (1 - self._filled) ** 2))
        noise = self.sigma_h * spread / (self._filled * self._denominator)
        self._weight.fill_(self._filled * self._denominator)
        self._least.fill_(_CLEAR * noise)
        self._cost.fill_((self._gradient_noise / self._denominator) ** 2 * self._parameters)

    @torch.no_grad()
    def take_in(self, released: Tensor) -> None:
        self._average.mul_(self.memory).add_(released, alpha=1 - self.memory)
        shares, known = self._shares()
        chosen = self._at_percentile(shares) if self.criterion == "percentile" else self._least_error(shares)
        self.thresholds.copy_(torch.where(known, chosen, self.thresholds))

    def _shares(self) -> tuple[Tensor, Tensor]:
        """(float64 [bins], a distribution; bool [], whether any bin stands out of the noise)."""
        averaged = self._average / self._weight
        clear = averaged >= self._least
        return _onto_simplex(torch.where(clear, averaged, averaged.new_full((), -math.inf))), clear.any()

    @property
    def edges(self) -> Tensor:
        """float64 [bins - 1]: the grid."""
        return self._edges.clone()

    @property
    def histogram(self) -> Tensor:
        """float64 [bins]: the average of the released histograms, noise included: safe to publish."""
        return self._average / max(self._filled, 1e-300)

    def _at_percentile(self, shares: Tensor) -> Tensor:
        below = shares.cumsum(0)
        # The sum may round to less than 1: past the last bin is the last bin.
        at = torch.searchsorted(below, below.new_full((1,), self.percentile)).clamp_max(self.width - 1)
        inside = (self.percentile - (below[at] - shares[at])) / shares[at].clamp_min(1e-300)
        begin, end = self._begin[at], self._end[at]
        return (begin + inside.clamp(0.0, 1.0) * (end - begin)).exp()

    def _least_error(self, shares: Tensor) -> Tensor:
        error = self._cost * self._edges.square() + self._excess @ shares
        return self._edges[error.argmin(dim=0, keepdim=True)]

    def config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "max_grad_norm": self._initial,
            "percentile": self.percentile,
            "bins": self.width,
            "sigma_h": self.sigma_h,
            "memory": self.memory,
        }

    def state_dict(self) -> dict[str, Any]:
        """The threshold in force and the average of the released histograms."""
        return {**super().state_dict(), "average": self._average.clone(), "filled": self._filled}

    def check_state(self, state: dict[str, Any]) -> None:
        super().check_state(state)
        filled = state["filled"]
        if not isinstance(filled, float) or not 0.0 <= filled <= 1.0:
            raise ValueError(f"clipping state filled must be a number in [0, 1], got {filled!r}")
        if not bool(state["average"].isfinite().all()):
            raise ValueError("clipping state average must be finite")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._average.copy_(state["average"])
        self._filled = state["filled"]


def _onto_simplex(values: Tensor) -> Tensor:
    """[M] -> the nearest distribution: max(values - c, 0) with the c for which it sums to 1."""
    ordered = values.sort(descending=True).values
    counts = torch.arange(1, len(values) + 1, dtype=values.dtype, device=values.device)
    cut = (ordered.cumsum(0) - 1.0) / counts
    # Gathered: a 0-dim index would be read back to the host.
    kept = ((ordered > cut).sum() - 1).clamp_min(0).reshape(1)
    return (values - cut.gather(0, kept)).clamp_min(0.0)
