"""Normalization layers with affine parameters whose statistics stay inside one sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaclip.layers import functions  # noqa: F401  (registers the operations)
from adaclip.layers.base import Layer, raised, sum_views
from adaclip.layers.tape import Use

__all__ = ["FrozenNormInside", "FrozenNormLayer", "GroupNormLayer", "InstanceNormLayer", "LayerNormLayer"]


class _AffineLayer(Layer):
    """Records the per-sample gradients of scale and shift, so nothing is left to do but sum them."""

    def _fold(self, use: Use, views: int) -> Use:
        return Use([sum_views(rows, views) for rows in use.tensors], use.forward)

    def sample_grads(self, use: Use, wanted: set[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        both = zip((self.module.weight, self.module.bias), use.tensors, strict=True)
        return {p: rows for p, rows in both if p in wanted}


class GroupNormLayer(_AffineLayer):
    def groups(self) -> int:
        return self.module.num_groups

    def forward(self, input: Tensor) -> Tensor:
        m = self.module
        operands = raised(input, m.weight, m.bias)
        return torch.ops.adaclip.group_norm(
            *operands, self.groups(), m.eps, self.backend, *self.slot.call_args()
        )[0]


class InstanceNormLayer(GroupNormLayer):
    """Instance normalization is group normalization with one channel a group."""

    def groups(self) -> int:
        return self.module.num_features

    def forward(self, input: Tensor) -> Tensor:
        kind = type(self.module).__name__
        spatial = next((n for n in (1, 2, 3) if f"{n}d" in kind), 1)
        if input.dim() != spatial + 2:
            raise ValueError(
                f"input of {self.name or kind} must be [B, C, {', '.join('*' * spatial)}] "
                f"(private training needs the batch dimension), got {tuple(input.shape)}"
            )
        return super().forward(input)


class LayerNormLayer(_AffineLayer):
    def forward(self, input: Tensor) -> Tensor:
        m = self.module
        if input.dim() <= len(m.normalized_shape):
            raise ValueError(
                f"input of {self.name or 'LayerNorm'} must be [B, ..., *normalized_shape] (private "
                f"training needs the batch dimension), got {tuple(input.shape)}"
            )
        operands = raised(input, m.weight, m.bias)
        return torch.ops.adaclip.layer_norm(
            *operands, list(m.normalized_shape), m.eps, *self.slot.call_args()
        )[0]


class FrozenNormLayer(_AffineLayer):
    """A BatchNorm that was in evaluation mode at `make_private`, where samples do not mix, or a `FrozenBatchNorm`.

    It stays there while the model is private, whatever `train()` sets: in training mode it would mix the samples and
    keep unprotected statistics of them.
    """

    def __call__(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.root.training and self.trainable():
            return self.forward(input)
        m = self.module
        return F.batch_norm(input, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, m.eps)

    def forward(self, input: Tensor) -> Tensor:
        m = self.module
        if input.dim() < 2:
            raise ValueError(
                f"input of {self.name or type(m).__name__} must be [B, C, *] (private training needs the batch "
                f"dimension), got {tuple(input.shape)}"
            )
        x, weight, bias, mean, var = raised(input, m.weight, m.bias, m.running_mean, m.running_var)
        return torch.ops.adaclip.frozen_norm(x, weight, bias, mean, var, m.eps, *self.slot.call_args())


class FrozenNormInside(FrozenNormLayer):
    """One inside of a module that answers for all parameters below it: it is only kept in evaluation mode."""

    def parameters(self) -> list[nn.Parameter]:
        return []
