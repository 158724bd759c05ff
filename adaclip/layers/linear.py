"""Linear layers on rows, sequences or any number of leading dimensions; embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adaclip import ops, reference
from adaclip.layers import functions  # noqa: F401  (registers the operations)
from adaclip.layers.base import (
    Gradients,
    Layer,
    Part,
    as_gradient,
    lowered,
    part_from_samples,
    rounding_bound,
    split_views,
)
from adaclip.layers.tape import Use

__all__ = ["EmbeddingLayer", "LinearLayer"]


def _sequences(t: Tensor) -> Tensor:
    """[B, ..., D] -> [B, T, D]."""
    return t.reshape(t.shape[0], -1 if t.shape[0] else t[:, ..., 0].numel(), t.shape[-1])


class LinearLayer(Layer):
    """Input [B, ..., in_features]; every position between batch and features belongs to the sample."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() < 2:
            raise ValueError(
                f"input of {self.name or 'Linear'} must be [B, ..., in_features] (private training needs "
                f"the batch dimension), got {tuple(input.shape)}"
            )
        operands = lowered(input, self.module.weight, self.module.bias)
        return torch.ops.adaclip.linear(*operands, *self.slot.call_args())

    def _fold(self, use: Use, views: int) -> Use:
        return Use([split_views(t, views) for t in use.tensors], use.forward)

    def merge(self, uses: list[Use]) -> Use | None:
        # Two uses of one weight are two stretches of one sequence.
        if len(uses) == 1:
            return uses[0]
        x, g = (torch.cat([_sequences(u.tensors[i]) for u in uses], dim=1) for i in (0, 1))
        return Use([x, g], uses[0].forward)

    def measure(self, use: Use, wanted: set[nn.Parameter]) -> Part:
        a, g = (_sequences(t) for t in use.tensors)
        weight, bias = self.module.weight, self.module.bias
        if weight not in wanted:
            return part_from_samples({bias: reference.wide(g).sum(1)}, self.backend)
        norms = ops.linear_sample_norms(a, g, bias=bias in wanted, backend=self.backend)
        sqnorms, kept, rows = norms.sqnorms, norms.kept, norms.bias
        if kept is None:
            rounding = ops.linear_grad_rounding(a, g, self.backend)
            # One position: nothing cancels, and what is left of adding up is inside the factors' slack.
            if a.shape[1] > 1 or rounding.operands:
                sqnorms = rounding_bound(sqnorms, norms.magnitudes, rounding)
        if rows is not None:
            sqnorms = sqnorms + ops.row_sqnorms(rows, backend=self.backend)

        def weigh(factors: Tensor) -> Gradients:
            if kept is not None:
                total = ops.weighted_sum(kept, factors, backend=self.backend)
            else:
                total = ops.linear_weighted_grad(a, g, factors, backend=self.backend)
            grads = [as_gradient(weight, total)]
            if rows is not None:
                grads.append(as_gradient(bias, ops.weighted_sum(rows, factors, backend=self.backend)))
            return grads

        return Part(sqnorms, weigh, a.numel() * a.element_size() + g.numel() * g.element_size())

    def sample_grads(self, use: Use, wanted: set[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        a, g = (_sequences(t) for t in use.tensors)
        grads = {}
        if self.module.weight in wanted:
            grads[self.module.weight] = ops.linear_sample_norms(a, g, keep=True, backend=self.backend).kept
        if self.module.bias in wanted:
            grads[self.module.bias] = reference.wide(g).sum(1)
        return grads


class EmbeddingLayer(Layer):
    """Input [B, ...] of indices. Norms of a sum over repeated tokens, `sum_{t,t'} [i_t = i_t'] g_t.g_t'`."""

    capturable = False  # how many different tokens a sample has is read back

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() < 1:
            raise ValueError(
                f"input of {self.name or 'Embedding'} must be [B, ...], got {tuple(input.shape)}"
            )
        return torch.ops.adaclip.embedding(input, self.module.weight, *self.slot.call_args())

    def _fold(self, use: Use, views: int) -> Use:
        return Use([split_views(t, views) for t in use.tensors], use.forward)

    def _flat(self, use: Use) -> tuple[Tensor, Tensor]:
        indices, g = use.tensors
        indices = indices.reshape(indices.shape[0], -1 if indices.shape[0] else indices[:, ...].numel())
        g = g.reshape(*indices.shape, g.shape[-1])
        padding_idx = self.module.padding_idx
        if padding_idx is not None:
            g = g.masked_fill((indices == padding_idx).unsqueeze(-1), 0)
        return indices, g

    def merge(self, uses: list[Use]) -> Use | None:
        if len(uses) == 1:
            return uses[0]
        flat = [self._flat(u) for u in uses]
        return Use([torch.cat([f[i] for f in flat], dim=1) for i in (0, 1)], uses[0].forward)

    def measure(self, use: Use, wanted: set[nn.Parameter]) -> Part:
        indices, g = self._flat(use)
        weight = self.module.weight
        # Per sample, so that the [T, T] products of one sample are all that exists at a time; in
        # float64, where the cancellation of a Gram form costs nothing that matters.
        sqnorms = torch.zeros(g.shape[0], dtype=torch.float64, device=g.device)
        magnitudes = torch.zeros_like(sqnorms)
        for b in range(g.shape[0]):
            wide = g[b].double()
            _, where = indices[b].unique(return_inverse=True)
            sums = wide.new_zeros(int(where.max()) + 1 if where.numel() else 0, wide.shape[1])
            sqnorms[b] = sums.index_add_(0, where, wide).square().sum()
            sizes = wide.new_zeros(sums.shape[0]).index_add_(0, where, wide.norm(dim=1))
            magnitudes[b] = sizes.square().sum()
        # One rounding of each product: their sum is in float64.
        unit = torch.finfo(reference.wide_dtype(g.dtype)).eps / 2
        sqnorms = rounding_bound(sqnorms, magnitudes, ops.Rounding(unit, 1))

        def weigh(factors: Tensor) -> Gradients:
            total = reference.embedding_weighted_grad(indices, g, factors, weight.shape[0])
            return [as_gradient(weight, total)]

        return Part(sqnorms, weigh, g.numel() * g.element_size())

    def sample_grads(self, use: Use, wanted: set[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        indices, g = self._flat(use)
        rows = self.module.num_embeddings
        return {self.module.weight: reference.embedding_sample_grads(indices, reference.wide(g), rows, None)}
