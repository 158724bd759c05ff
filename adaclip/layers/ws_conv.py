"""Layers that the models are made of and torch does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def standardize(weight: Tensor, eps: float) -> Tensor:
    """[Cout, …] with mean 0 and variance var/(var + eps) per output channel, differentiable in `weight`."""
    var, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
    return (weight - mean) * torch.rsqrt(var + eps)


class WSConv2d(nn.Conv2d):
    """A convolution that runs with its weight standardized (Qiao et al. 2019, arXiv 1903.10520).

    Per output channel, over its n = Cin/groups·kh·kw weights::

        w^ = (w - mean(w)) / sqrt(var(w) + eps)        var with divisor n

    ``weight`` [Cout, Cin/groups, kh, kw] is the trained tensor and the one in the state dict; ``w^`` is
    computed in every forward and never stored. It depends on the parameters alone, so it mixes no samples,
    and there is no learned gain. Follow it with a norm: w^ has norm sqrt(n), which nothing else scales back.

    Args:
        eps: added to the variance, > 0. The other arguments are those of ``torch.nn.Conv2d``.

    Raises:
        ValueError: eps <= 0, or one weight per output channel (its standardized value is always 0).
    """

    def __init__(self, *args: Any, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not eps > 0:
            raise ValueError(f"eps must be > 0, got {eps}")
        if self.weight[0].numel() < 2:
            raise ValueError(
                f"a standardized convolution must have at least 2 weights per output channel, got weight "
                f"{tuple(self.weight.shape)}"
            )
        self.eps = eps

    def standardized_weight(self) -> Tensor:
        """w^ [Cout, Cin/groups, kh, kw], differentiable in ``weight``."""
        return standardize(self.weight, self.eps)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.standardized_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}"
