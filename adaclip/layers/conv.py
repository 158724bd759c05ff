"""Conv1d, Conv2d, Conv3d and the weight-standardized Conv2d."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    sum_views,
)
from adaclip.layers.tape import Use
from adaclip.layers.ws_conv import standardize
from adaclip.shards import is_sharded, whole

__all__ = ["ConvLayer", "StandardizedConvLayer"]


class ConvLayer(Layer):
    """Any stride, padding (numbers, "same", "valid", every padding_mode), dilation and groups."""

    def weight(self) -> Tensor:
        return self.module.weight

    def forward(self, input: Tensor) -> Tensor:
        m = self.module
        spatial = len(m.kernel_size)
        if input.dim() != spatial + 2:
            raise ValueError(
                f"input of {self.name or type(m).__name__} must be [B, C, {', '.join('*' * spatial)}] "
                f"(private training needs the batch dimension), got {tuple(input.shape)}"
            )
        x, weight, bias = lowered(self._padded(input), self.weight(), m.bias)
        geometry = self._geometry()
        return torch.ops.adaclip.conv(
            x,
            weight,
            bias,
            geometry["stride"],
            geometry["padding"],
            geometry["dilation"],
            m.groups,
            self.saves_output(x),
            *self.slot.call_args(),
        )

    def saves_output(self, x: Tensor) -> bool:
        """Whether the per-sample norm needs the products of output and output gradient."""
        return False

    def _padded(self, x: Tensor) -> Tensor:
        """The input with whatever the convolution's own symmetric zero padding cannot express."""
        m = self.module
        if m.padding_mode != "zeros":
            return F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode)
        if m.padding == "same":
            # An odd total puts the extra zero at the end, as torch does.
            extra = [d * (k - 1) % 2 for d, k in zip(m.dilation, m.kernel_size, strict=True)]
            if any(extra):
                return F.pad(x, [side for e in reversed(extra) for side in (0, e)])
        return x

    def _fold(self, use: Use, views: int) -> Use:
        # Views become an axis in front of the image's own, along which the kernel is 1 wide; the core and
        # torch know three axes.
        if len(self.module.kernel_size) == 3:
            return super()._fold(use, views)
        x, g = (split_views(t, views).transpose(1, 2).contiguous() for t in use.tensors)
        return Use([x, g], use.forward)

    def _geometry(self, axes: int | None = None) -> dict:
        """The convolution's arguments, with the padding that is left to it after `_padded`.

        axes: those of an input with views folded in; None for the module's own.
        """
        m = self.module
        if m.padding_mode != "zeros" or m.padding == "valid":
            padding = [0] * len(m.kernel_size)
        elif m.padding == "same":
            padding = [d * (k - 1) // 2 for d, k in zip(m.dilation, m.kernel_size, strict=True)]
        else:
            padding = list(m.padding)
        views = 0 if axes is None else axes - len(m.kernel_size)
        return {
            "kernel": [1] * views + list(m.kernel_size),
            "stride": [1] * views + list(m.stride),
            "padding": [0] * views + padding,
            "dilation": [1] * views + list(m.dilation),
            "groups": m.groups,
        }

    def _weighted(self, x: Tensor, g: Tensor, factors: Tensor) -> Tensor:
        """`sum_b factors_b dL_b/dweight`, shaped like the weight."""
        weight, geometry = self.module.weight, self._geometry(x.dim() - 2)
        # Of a sharded weight the shape is what is left; its values do not matter.
        like = (
            torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            if is_sharded(weight)
            else weight
        )
        shaped = like.detach().reshape(*weight.shape[:2], *geometry["kernel"])
        total = ops.conv_weighted_grad(x, g, factors, shaped, **geometry, backend=self.backend)
        return total.reshape(weight.shape)

    def measure(self, use: Use, wanted: set[nn.Parameter]) -> Part:
        if use.views > 1:
            return super().measure(use, wanted)
        x, g = use.tensors[:2]
        weight, bias = self.module.weight, self.module.bias
        if weight not in wanted:
            return part_from_samples({bias: _position_sums(g)}, self.backend)
        geometry = self._geometry(x.dim() - 2)
        norms = ops.conv_sample_norms(x, g, **geometry, bias=bias in wanted, backend=self.backend)
        sqnorms, kept, rows = norms.sqnorms, norms.kept, norms.bias
        if kept is None:
            rounding = ops.conv_grad_rounding(x, g, **geometry, backend=self.backend)
            sqnorms = rounding_bound(sqnorms, norms.magnitudes, rounding)
        if rows is not None:
            sqnorms = sqnorms + ops.row_sqnorms(rows, backend=self.backend)

        def weigh(factors: Tensor) -> Gradients:
            if kept is not None:
                total = ops.weighted_sum(kept, factors, backend=self.backend).reshape(weight.shape)
            else:
                total = self._weighted(x, g, factors)
            grads = [as_gradient(weight, total)]
            if rows is not None:
                grads.append(as_gradient(bias, ops.weighted_sum(rows, factors, backend=self.backend)))
            return grads

        held = kept if kept is not None else g
        return Part(sqnorms, weigh, held.numel() * held.element_size())

    def sample_grads(self, use: Use, wanted: set[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        x, g = use.tensors[:2]
        weight, bias = self.module.weight, self.module.bias
        grads = {}
        if weight in wanted:
            geometry = self._geometry(x.dim() - 2)
            kept = ops.conv_sample_norms(x, g, **geometry, keep=True, backend=self.backend).kept
            grads[weight] = sum_views(kept.reshape(-1, *weight.shape), use.views)
        if bias in wanted:
            grads[bias] = sum_views(_position_sums(g), use.views)
        return grads


def _position_sums(g: Tensor) -> Tensor:
    """[B, C, *out] -> [B, C], summed in at least float32."""
    return g.flatten(2).sum(-1, dtype=reference.wide_dtype(g.dtype))


class StandardizedConvLayer(ConvLayer):
    """A convolution with the standardized weight `w^ = (w - mean) / s`, per output channel.

    The chain rule from w^ to w is one linear map for all samples, per output channel of n weights
    `P' = (I - 11'/n - w^ w^'/n) / s`. With g' = g/s the gradient is P' of the ordinary one, so

        |P'G|^2 = |G|^2 - <1, G>^2/n - (2 - |w^|^2/n) <w^, G>^2/n,

    where <w^, G> = sum_t g' y is known from the layer's own output y and <1, G> = sum_t g' box(x)
    from a one-channel convolution: exact norms, and no per-sample gradient is formed for them. Where
    the per-sample gradient is formed anyway, P' is applied to it instead.

    Outputs are rounded: each is a sum of n products, and on a GPU kept in 16 bits or made of operands in TF32. With an
    error of at most u |w^| * |x| in each output, and at most u |g'| in g' where it is rounded too, <w^, G>/sqrt(n),
    taken as a vector over the output channels, is off by at most (u + u') sqrt(M) in norm, M the sample's magnitude:
    |w^| is at most sqrt(n). So is <1, G>/sqrt(n) by the rounding of its products. That much less is taken away. (A
    bias in the output adds its own rounding, u |b| sum_t |g'|.)
    """

    def saves_output(self, x: Tensor) -> bool:
        # On the CPU 16-bit outputs would hide part of the norm, and gradients are instantiated in their place.
        if x.device.type == "cpu" and x.dtype not in (torch.float32, torch.float64):
            return False
        # Compiled code does not ask what the sizes decide: they may be symbols there. `measure` asks again.
        return torch.compiler.is_compiling() or not ops.conv_keeps(
            x, self.module.out_channels, **self._geometry(), backend=self.backend
        )

    def weight(self) -> Tensor:
        weight = self.module.standardized_weight()
        # It gets no gradient. A compiler refuses to make a leaf inside of a graph, and needs none.
        return weight if torch.compiler.is_compiling() else weight.detach().requires_grad_()

    def _fold(self, use: Use, views: int) -> Use:
        x, g, *dots = use.tensors
        folded = super()._fold(Use([x, g], use.forward), views)
        return Use([*folded.tensors, *(sum_views(d, views) for d in dots)], use.forward)

    def _values(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(w^, 1/s per output channel [Cout], the bias), of whole parameters where they are sharded."""
        m = self.module
        weight = whole(m.weight)
        inverse = (reference.wide(weight).var(dim=(1, 2, 3), unbiased=False) + m.eps).rsqrt()
        return standardize(weight, m.eps), inverse, None if m.bias is None else whole(m.bias)

    def _project(self, total: Tensor, standardized: Tensor) -> Tensor:
        """P' s applied to [..., Cout, Cin/groups, kh, kw]."""
        dims = (-3, -2, -1)
        along = (total * standardized).mean(dims, keepdim=True)
        return total - total.mean(dims, keepdim=True) - standardized * along

    def measure(self, use: Use, wanted: set[nn.Parameter]) -> Part:
        m = self.module
        weight, bias = m.weight, m.bias
        if weight not in wanted:
            return super().measure(use, wanted)
        x, g, *output = use.tensors
        geometry = self._geometry(x.dim() - 2)
        # Folded views may have made keeping the cheaper way.
        if not output or ops.conv_keeps(x, weight.shape[0], **geometry, backend=self.backend):
            return part_from_samples(self.sample_grads(use, wanted), self.backend)
        dots = output[0]
        standardized, inverse, shift = self._values()
        scaled = g * inverse.reshape(-1, *[1] * (g.dim() - 2))
        if x.dtype == torch.bfloat16 and x.device.type != "cpu":
            # In the inputs' dtype, as the kernels want it; its gradients are the ones that are summed.
            scaled = scaled.to(x.dtype)
        rows = _position_sums(g)
        n = weight[0].numel()
        norms = ops.conv_sample_norms(x, scaled, **geometry, keep=False, backend=self.backend)
        # Sums over channels and positions are in float64: what is taken away below can be larger than what is left.
        along_weight = dots.double()
        if shift is not None:
            along_weight = along_weight - shift.double() * g.flatten(2).sum(-1, dtype=torch.float64)
        along_weight = along_weight * inverse.double()
        channel_sums = x.reshape(x.shape[0], m.groups, -1, *x.shape[2:]).sum(2, dtype=torch.float64)
        images = channel_sums.flatten(1, -3)
        ones = images.new_ones(images.shape[1], 1, *m.kernel_size)
        box = F.conv2d(images, ones, None, m.stride, geometry["padding"][-2:], m.dilation, images.shape[1])
        box = box.reshape(*channel_sums.shape[:-2], *g.shape[-2:])
        wide = reference.wide_dtype(scaled.dtype)
        box = box.to(wide).repeat_interleave(weight.shape[0] // m.groups, dim=1)
        along_ones = (scaled * box).flatten(2).sum(-1, dtype=torch.float64)
        length = standardized.double().square().sum((1, 2, 3)) / n
        rounded = torch.finfo(wide).eps / 2
        # An output's n products and their sum, the product with g and its scale; however the sum is ordered.
        unit = ops.conv_output_unit(x) + (n + 4) * rounded
        scale = norms.magnitudes.sqrt()
        missed = unit * scale
        if shift is not None:
            spread = scaled.abs().flatten(2).sum(-1, dtype=torch.float64) * shift.double()
            missed = missed + unit * (spread.square().sum(1) / n).sqrt()
        # An error in <w^, G> counts sqrt(2 - |w^|^2/n) times, which is 1 but for eps.
        missed = missed * (2 - length.amin()).clamp_min(1).sqrt()
        weights = ((2 - length) * along_weight.square()).sum(1).div(n).clamp_min(0).sqrt()
        means = along_ones.square().sum(1).div(n).sqrt()
        removed = (weights - missed).clamp_min(0).square()
        removed = removed + (means - 4 * rounded * scale).clamp_min(0).square()
        exact = (norms.sqnorms - removed).clamp_min(0)
        rounding = ops.conv_grad_rounding(x, scaled, **geometry, backend=self.backend)
        sqnorms = rounding_bound(exact, norms.magnitudes, rounding)
        # A non-finite gradient must stay visible: clamping would have hidden it.
        sqnorms = torch.where(norms.sqnorms.isfinite(), sqnorms, norms.sqnorms)
        if bias in wanted:
            sqnorms = sqnorms + ops.row_sqnorms(rows, backend=self.backend)

        def weigh(factors: Tensor) -> Gradients:
            total = self._weighted(x, scaled, factors)
            grads = [as_gradient(weight, self._project(total, standardized))]
            if bias in wanted:
                grads.append(as_gradient(bias, ops.weighted_sum(rows, factors, backend=self.backend)))
            return grads

        return Part(sqnorms, weigh, scaled.numel() * scaled.element_size())

    def sample_grads(self, use: Use, wanted: set[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        grads = super().sample_grads(use, wanted)
        if self.module.weight in grads:
            standardized, inverse, _ = self._values()
            scaled = grads[self.module.weight] * inverse.reshape(-1, 1, 1, 1)
            grads[self.module.weight] = self._project(scaled, reference.wide(standardized))
        return grads
