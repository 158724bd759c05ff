"""Batch normalization by statistics that do not change."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FrozenBatchNorm"]


class FrozenBatchNorm(nn.Module):
    """What a BatchNorm computes in evaluation mode, in every mode: samples do not mix, and nothing is kept of them.

        y = weight (x - running_mean) / sqrt(running_var + eps) + bias,    x, y: [B, C, *]

    weight and bias [C] are trained as usual; the statistics [C] are buffers, and constants. Private training does not
    protect the examples that they were computed from: they must come from public data (a public pretraining).

    State dicts are BatchNorm's; `num_batches_tracked` may be in one and is dropped.

    Args:
        num_features: C.
        eps: added to the variance.
        affine: False: no weight and bias.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_features, self.eps, self.affine = num_features, eps, affine
        made = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(num_features, **made)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, **made)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features, **made))
        self.register_buffer("running_var", torch.ones(num_features, **made))

    def forward(self, input: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var
        return F.batch_norm(input, *statistics, self.weight, self.bias, False, 0.0, self.eps)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"
