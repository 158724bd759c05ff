"""The norm used for clipping bounds what is added to the sum, for every input (adversarial ones too)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adaclip import ops, reference
from adaclip.clipping import clip_factors
from adaclip.layers import Tape, build_layers
from adaclip.layers.base import rounding_bound
from adaclip.layers.ws_conv import WSConv2d

LIMIT = 1 + 2.0**-20
GEOMETRY = {"kernel": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}


def near_null(batch, cin, cout, size, scale, seed):
    """x and g of size `scale` whose weight gradient nearly cancels over positions."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, cin, 1, 1, generator=gen) * scale
    x = x.expand(batch, cin, size, size) + torch.randn(batch, cin, size, size, generator=gen)
    g = torch.randn(batch, cout, size, size, generator=gen)
    # Opposite values, far apart in the order of summation, zero on the border that padding breaks.
    g[..., 0, :] = g[..., -1, :] = g[..., :, 0] = g[..., :, -1] = 0
    inner = g[..., 1:-1, 1:-1].reshape(batch, cout, -1)
    half = inner.shape[-1] // 2
    inner[..., half : 2 * half] = -inner[..., :half].flip(-1)
    inner[..., 2 * half :] = 0
    g[..., 1:-1, 1:-1] = inner.reshape(batch, cout, size - 2, size - 2)
    return x.contiguous(), g.contiguous()


def fp32_gram(x, g):
    fields = reference.windows(x, [3, 3], [1, 1], [1, 1], [1, 1])
    fields = fields.permute(0, 1, 4, 5, 2, 3).flatten(1, 3).flatten(2)
    g = g.flatten(2)
    return ((fields.mT @ fields) * (g.mT @ g)).sum((1, 2))


def test_the_crafted_inputs_break_a_plain_float32_gram():
    x, g = near_null(64, 16, 8, 10, 3e4, 0)
    exact = reference.row_sqnorms(
        reference.conv_sample_grads(x.double(), g.double(), *[GEOMETRY[k] for k in GEOMETRY])
    )
    assert bool((fp32_gram(x, g) < 0.5 * exact).any())


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([(4, 4), (16, 8), (64, 128)]),
    st.sampled_from([4, 8, 12, 16]),
    st.sampled_from([1.0, 1e2, 3e4, 1e6]),
    st.integers(0, 1000),
)
def test_convolution(channels, size, scale, seed):
    cin, cout = channels
    x, g = near_null(4, cin, cout, size, scale, seed)
    args = [GEOMETRY[k] for k in GEOMETRY]
    exact = reference.conv_sample_grads(x.double(), g.double(), *args)
    norms = reference.row_sqnorms(exact).sqrt()
    for keep in (None, True):
        made = ops.conv_sample_norms(x, g, **GEOMETRY, keep=keep)
        bounds = made.sqnorms
        if made.kept is None:
            bounds = rounding_bound(bounds, made.magnitudes, ops.conv_grad_rounding(x, g, **GEOMETRY))
        # Norms near C, where an underestimate would matter most.
        bound = float(norms.median())
        factors = clip_factors(bounds.sqrt(), bound)
        weight = torch.empty(cout, cin, 3, 3)
        if made.kept is None:
            assert bool((factors * norms <= bound * LIMIT).all())
        for b in range(x.shape[0]):
            one = factors[b : b + 1].float()
            if made.kept is None:
                share = ops.conv_weighted_grad(x[b : b + 1], g[b : b + 1], one, weight, **GEOMETRY)
            else:
                share = ops.weighted_sum(made.kept[b : b + 1], one)
            # What is added to the sum, rounding included.
            assert float(share.double().norm()) <= bound * LIMIT


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 64), st.sampled_from([1.0, 1e3, 1e6]), st.integers(0, 1000))
def test_linear(positions, scale, seed):
    gen = torch.Generator().manual_seed(seed)
    a = torch.randn(4, 1, 20, generator=gen) * scale + torch.randn(4, 2 * positions, 20, generator=gen)
    g = torch.randn(4, positions, 30, generator=gen)
    g = torch.cat([g, -g.flip(1)], dim=1)
    norms = reference.row_sqnorms(reference.linear_sample_grads(a.double(), g.double())).sqrt()
    made = ops.linear_sample_norms(a, g)
    bounds = made.sqnorms
    if made.kept is None:
        bounds = rounding_bound(bounds, made.magnitudes, ops.linear_grad_rounding(a, g))
    bound = float(norms.median())
    factors = clip_factors(bounds.sqrt(), bound)
    for b in range(4):
        if made.kept is None:
            assert float(factors[b] * norms[b]) <= bound * LIMIT
            share = (factors[b].float() * g[b]).t() @ a[b]
        else:
            share = factors[b].float() * made.kept[b]
        assert float(share.double().norm()) <= bound * LIMIT


def standardized(conv, x, g):
    """(upper bounds, exact norms) of the weight's gradients for inputs x and output gradients g, from outputs."""
    tape = Tape(lambda: bounds.append(layer.measure(layer.slot.uses[0], {conv.weight}).sqnorms.sqrt()))
    bounds = []
    (layer,) = build_layers(conv, tape, "auto")
    layer.attach()
    (conv(x) * g).sum().backward()
    layer.detach()
    copy = WSConv2d(conv.in_channels, conv.out_channels, 3, stride=3, bias=conv.bias is not None).double()
    copy.load_state_dict(conv.state_dict())
    norms = []
    for image, grad in zip(x.double(), g.double(), strict=True):
        (gradient,) = torch.autograd.grad((copy(image[None]) * grad).sum(), copy.weight)
        norms.append(gradient.norm())
    return bounds[0], torch.stack(norms)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 10.0, 1e2, 1e3])
@pytest.mark.parametrize("offset", [0.1, 1e-3])
def test_standardized_convolution(monkeypatch, bias, scale, offset):
    # Two patches that nearly cancel, and leave what the standardization takes away from a gradient.
    monkeypatch.setattr(ops, "conv_keeps", lambda *args, **options: False)
    gen = torch.Generator().manual_seed(0)
    conv = WSConv2d(8, 1, 3, stride=3, bias=bias)
    if bias:
        nn.init.constant_(conv.bias, 3.0)
    left = torch.randn(128, 8, 3, 3, generator=gen) * offset
    base = torch.randn(128, 8, 3, 3, generator=gen) * scale
    x = torch.cat([base + conv.standardized_weight().detach() + left, base], dim=2)
    g = torch.tensor([1.0, -1.0]).reshape(1, 1, 2, 1).expand(128, 1, 2, 1).contiguous()
    bounds, norms = standardized(conv, x, g)
    assert bool((bounds * LIMIT >= norms).all())


@pytest.mark.parametrize("norm", [0.0, 1e-12, 0.5, 1.0, 1.0 + 1e-7, 1e12, 1e300, float("inf"), float("nan")])
def test_factors(norm):
    factor = float(clip_factors(torch.tensor([norm], dtype=torch.float64), 1.0))
    if norm in (float("inf"),) or norm != norm:
        assert factor == 0
    else:
        assert 0 < factor <= 1
        assert factor * norm <= 1
        assert factor == 1 or factor * norm > 1 - 1e-6
