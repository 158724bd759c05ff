"""Channels whose sums of products lose what adding can lose, for the tests of norm kernels that add on tensor cores."""

import torch


def bfloat16(t):
    return t.to(torch.bfloat16).double()


def lossy_rows(length, count=200):
    """Two float64 [4 count, length] of bfloat16 values.

    Rows are of one value over and over, of one sign, canceling, and one large value before many small ones.
    """
    rng = torch.Generator().manual_seed(length)
    alike = 1 + torch.rand(count, 1, generator=rng).expand(count, length)
    mixed = torch.rand(count, length, generator=rng) + 0.5
    signs = torch.randint(2, (count, length), generator=rng) * 2 - 1
    large = torch.full((count, length), 2.0**-12) * (1 + torch.rand(count, 1, generator=rng))
    large[:, 0] = 1.99
    pairs = [(alike, alike), (mixed, mixed.flip(0)), (mixed * signs, mixed.flip(1)), (large, large)]
    return tuple(torch.cat([bfloat16(t) for t in side]) for side in zip(*pairs, strict=True))


def lossy_images(length, count, dtype, device):
    """x, g [B, length, 1, 2] for a 1 x 1 kernel: one position alone, where the norm is |x|^2 |g|^2, and two of
    opposite g, where nearly all of it cancels.

    float32 values have digits below bfloat16's, so that their halves in TF32 are both at work.
    """
    a, b = lossy_rows(length, count)
    if dtype == torch.float32:
        a, b = (t * (1 + 1 / 3 * 2.0**-9) for t in (a, b))
    elif dtype == torch.float16:
        b = b * 2.0**-4
    alone = torch.stack([a, torch.zeros_like(a)], -1), torch.stack([b, b], -1)
    other = a * (1 + 2.0**-7 * (torch.arange(length) % 5 == 0))
    opposite = torch.stack([a, other], -1), torch.stack([b, -b], -1)
    x, g = (torch.cat(side)[:, :, None].to(device, dtype) for side in zip(alone, opposite, strict=True))
    layout = {"memory_format": torch.channels_last}
    return x.contiguous(**layout), g.contiguous(**layout)


def gram_norms(x, g):
    """(squared norms, magnitudes), float64 [B], of such images, by Gram matrices in float64: at most 1e-12 of the
    magnitudes off. The gradients themselves would take too much memory.
    """
    x, g = (t.double().cpu()[:, :, 0] for t in (x, g))
    k, s = (torch.einsum("bct,bcu->btu", t, t) for t in (x, g))
    return (k * s).sum((1, 2)), (x.norm(dim=1) * g.norm(dim=1)).sum(1).square()
