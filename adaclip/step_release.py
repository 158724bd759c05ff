"""What one step releases: the gradient's noisy sum and, beside it, side statistics of the same batch.

A step releases one vector, [gradient | statistics], a sum over the batch of bounded vectors, one for each
example, plus Gaussian noise. If an example's contribution to part i has norm at most D_i and the part's noise
standard deviation s_i, the vector divided by its noise is one Gaussian mechanism of noise multiplier sigma,

    sigma^-2 = sum_i (D_i / s_i)^2.

sigma is what a step is calibrated for and booked with; `gradient_sigma` says what of it is the gradient's.
Each later release may depend on earlier ones (thresholds do): that is adaptive composition of such steps.

The D_i are norms of what one example adds, whatever the adjacency: see `adaclip.accounting.releases`. So the
indicator 1[n <= C] - 1/2 counts 1/2, and it is 0, not -1/2, for an example that is absent or null.

All this is in real numbers. In floating point the last digits of a sample's gradient (some 1e-7 of it) also depend on
the shape of the batch it is in: a mean loss divides by its rows, and matrix products are split by them. So another
example's presence can flip an indicator whose norm is that close to the threshold. `pad_to` gives every batch one
shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

import torch
from torch import Tensor

from adaclip.clipping import SideRelease, SplitRelease
from adaclip.noise import STREAM_STATISTICS, NoiseSource
from adaclip.ranges import MAX_FLOAT

__all__ = ["Statistics", "check_noise", "gradient_sigma"]


def check_noise(noise_multiplier: float) -> None:
    """Raise TypeError or ValueError unless it is a finite number of at least 0."""
    if isinstance(noise_multiplier, bool) or not isinstance(noise_multiplier, (int, float)):
        raise TypeError(f"noise_multiplier must be a number, got {noise_multiplier!r}")
    if not 0 <= noise_multiplier <= MAX_FLOAT:
        raise ValueError(f"noise_multiplier must be finite and at least 0, got {noise_multiplier!r}")


def gradient_sigma(sigma: float, parts: Iterable[tuple[float, float]]) -> float:
    """sigma_g = (sigma^-2 - sum_i (D_i/s_i)^2)^(-1/2), the gradient's share of a step's noise multiplier.

    Args:
        sigma: the whole step's noise multiplier, finite, >= 0. With 0 nothing is private, and the result is 0.
        parts: (D_i, s_i) of each side release: contribution norm and noise standard deviation.

    Returns:
        sigma itself without parts; else the formula, rounded up: the joint mechanism's noise multiplier, in
        exact arithmetic, is not below sigma, and above it by no more than a relative 1e-12.

    Raises:
        ValueError: an s_i is not positive and finite, or the parts cost all of sigma. The message names each
          part's cost and the least s_i that would do.
    """
    check_noise(sigma)
    parts = list(parts)
    for i, (bound, std) in enumerate(parts):
        if not 0 < std < math.inf or not 0 <= bound < math.inf:
            raise ValueError(
                f"a side release must have a finite sensitivity and a positive finite noise standard deviation, "
                f"got part {i} = ({bound!r}, {std!r})"
            )
    if sigma == 0 or not parts:
        return sigma
    # Exactly: a cost that is off by one rounding could let the joint release pass what is booked.
    costs = [(Fraction(bound) / Fraction(std)) ** 2 for bound, std in parts]
    cost, whole = sum(costs), 1 / Fraction(sigma) ** 2
    if cost >= whole:
        raise ValueError(_infeasible(sigma, parts, costs))
    left = whole - cost
    found = float(sigma / math.sqrt(left / whole))
    step = math.ulp(found)
    while 1 / Fraction(found) ** 2 > left:
        found += step
        step *= 2
    return found


def _infeasible(sigma: float, parts: list[tuple[float, float]], costs: list[Fraction]) -> str:
    whole = 1 / Fraction(sigma) ** 2
    lines = []
    for (bound, std), own in zip(parts, costs, strict=True):
        left = whole - (sum(costs) - own)
        share = float(own / whole)
        if left > 0:
            cure = f"alone it must exceed {bound / math.sqrt(left):.6g}"
        else:
            cure = "the others cost too much already"
        lines.append(f"noise {std:.6g} for sensitivity {bound:.6g} takes {share:.3g} of it ({cure})")
    return (
        f"noise_multiplier {sigma:.6g} must leave something for the gradient, but the statistics that are released "
        "beside it cost all of the privacy it stands for: "
        + "; ".join(lines)
        + ". Give the statistics more noise, or lower noise_multiplier"
    )


class Statistics:
    """The running sums of a step's side releases over its micro-batches, and their release.

    `sums` is one tensor, float64 [S]: parts lie one behind the other, in the order given. Like the gradient's
    sum it is added up over a logical batch, and what several processes have may be added.
    """

    def __init__(self, parts: Iterable[SideRelease], device: torch.device, backend: str = "auto"):
        self._backend = backend
        self.parts = list(parts)
        # (contribution norm, noise standard deviation) of every part, for `gradient_sigma`. Taken now, as the noise is:
        # what a part says later of its sigma changes neither.
        self.sensitivities = [pair for part in self.parts for pair in part.sensitivities]
        stds = [std for part in self.parts for std in part.stds()]
        self.sums = torch.zeros(len(stds), dtype=torch.float64, device=device)
        self._stds = torch.tensor(stds, dtype=torch.float64, device=device)
        # A power of two, 64 to 128 of them to a standard deviation.
        self._grid = torch.exp2(self._stds.log2().floor() - 6)
        widths = [part.width for part in self.parts]
        if sum(widths) != len(stds):
            raise ValueError(
                f"side releases must give a std for each entry: widths {widths}, {len(stds)} stds"
            )
        self._slices = list(self.sums.split(widths)) if widths else []
        wanted = [
            key for part, sums in zip(self.parts, self._slices, strict=True) for key in part.outputs(sums)
        ]
        if len(set(wanted)) < len(wanted):
            raise ValueError(f"side releases must each have statistics of their own, got {sorted(wanted)}")

    def outputs(self) -> dict[str, Tensor]:
        """Keyword arguments for `adaclip.ops.sample_statistics`: where each part adds up, and what it needs."""
        arguments: dict[str, Tensor] = {}
        for part, sums in zip(self.parts, self._slices, strict=True):
            arguments |= part.outputs(sums)
        return arguments

    def clear(self) -> None:
        """Drop what was added up."""
        self.sums.zero_()

    def release(self, source: NoiseSource, t: int) -> None:
        """Release number t: noisy sums to the parts, which take them in; then the sums start anew.

        Noise is drawn for every entry, in the order of the sums, also for an empty batch. What is released is
        rounded to a grid: noise is made of float32 normals, so the last digits of a float64 sum would tell which
        sums are possible at all, and which are not (Mironov 2012, the significance of least significant bits).
        """
        for part, released in self._noisy(source, t):
            part.absorb(released, t)
        self.clear()

    @property
    def unsplit(self) -> list[str]:
        """The classes of the parts that are no `adaclip.clipping.SplitRelease`: `prepare` needs all to be one."""
        return [type(part).__name__ for part in self.parts if not isinstance(part, SplitRelease)]

    def prepare(self, t: int) -> None:
        """The host's part of `release`, before everything that the device does for release t."""
        for part in self.parts:
            part.prepare(t)

    def release_prepared(self, source: NoiseSource, step: int | Tensor) -> None:
        """The device's part of `release`; step as in `NoiseSource.normal_`. A CUDA graph may capture it."""
        for part, released in self._noisy(source, step):
            part.take_in(released)
        self.clear()

    def _noisy(self, source: NoiseSource, step: int | Tensor) -> list[tuple[SideRelease, Tensor]]:
        if not self.parts:
            return []
        noise = torch.empty_like(self.sums)
        source.normal_(noise, step, STREAM_STATISTICS, backend=self._backend)
        noisy = noise.mul_(self._stds).add_(self.sums).div_(self._grid).round_().mul_(self._grid)
        return list(zip(self.parts, noisy.split([part.width for part in self.parts]), strict=True))
