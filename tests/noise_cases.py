"""Cases of the noise kernels that every backend runs: addresses, tensors in the midst of nan, and rules of every kind."""

from itertools import accumulate

import torch

from adaclip import _core
from adaclip.noise import chunks

KEY = bytes(range(32))
STEP, STREAM = (1 << 64) - 2, (1 << 32) - 3  # as signed numbers they are negative
FIRST = (1 << 28) - 100  # the block counter passes 2^31

# Elements: a chunk has 160, a tile of the GPU kernels 2560, a warp's share of it 640.
SIZES = [7, 0, 161, 2561, 1, 640, 320]


def device_key(device, step=STEP):
    """(key int32 [8], step int64 [1]) as GPU kernels read them."""
    words = torch.frombuffer(bytearray(KEY), dtype=torch.int32).to(device)
    return words, torch.tensor([step - (1 << 64) if step >= 1 << 63 else step], device=device)


def same_bits(a, b):
    return a.shape == b.shape and torch.equal(a.cpu().view(torch.int32), b.cpu().view(torch.int32))


def placed(values, device, offset=0):
    """The values as a view of memory full of nan, `offset` floats past an address that 16 divides."""
    room = torch.full((len(values) + 16,), float("nan"), device=device)
    view = room[8 + offset : 8 + offset + len(values)]
    view.copy_(values)
    return view


def around(view):
    """All of the memory that `placed` made."""
    return view._base


def spread(n, seed):
    """float32 [n] of many magnitudes and both signs, with zeros of both signs."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=rng) * 2.0 ** torch.randint(-20, 8, (n,), generator=rng)
    x[::7] = 0.0
    x[3::14] = -0.0
    return x


def first_chunks():
    return [FIRST + before for before in accumulate(map(chunks, SIZES[:-1]), initial=0)]


# std, sign, l2, shrink, decay, keep, direct, follow, square_decay, square_keep, scale, eps, variance, floor_sq
_PLAIN = (0.3, 1.0, 0.01, 0.99, 0.0, 1.0, 0.7, float("nan"), 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
_MOMENTUM = (1.7, -1.0, 0.0, 1.0, 0.9, 0.3, 0.2, 0.05, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
_ADAPTIVE = (0.11, 1.0, 0.02, 0.999, 0.9, 0.1, 0.003, 0.01, 0.99, 0.01, 3.3, 1e-8, 0.5, -1.0)
_CORRECTED = (0.2, 1.0, 0.0, 1.0, 0.9, 0.1, 0.0, 0.01, 0.99, 0.01, 1.2, 1e-8, 0.04, 0.0025)
_FLOOR_0 = (*_CORRECTED[:13], 0.0)
_RULES = [(_PLAIN, 2), (_MOMENTUM, 3), (_ADAPTIVE, 4), (_CORRECTED, 4), (_FLOOR_0, 4)]  # and how many tensors
ROUNDS = range(5)
"""Over these every size meets every rule."""


def step_case(round, device, offset=0):
    """(rows of [param, grad, momentum, square], None where there is none; rules): equal on all devices.

    Some tensors have no gradient, some no noise, some neither.
    """
    rows, rules = [], []
    for i, n in enumerate(SIZES):
        rule, tensors = _RULES[(i + round) % 5]
        row = [placed(spread(n, 100 * i + slot), device, offset * (1 + slot)) for slot in range(tensors)]
        row += [None] * (4 - tensors)
        if row[3] is not None:
            row[3].abs_()
        if (i + 2 * round) % 3 == 0:
            row[1] = None
        rows.append(row)
        rules.append((0.0, *rule[1:]) if (i + round) % 4 == 0 else rule)
    return rows, rules


def addresses(rows):
    return [[0 if t is None else t.data_ptr() for t in row] for row in rows]


def core_step(rows, rules, step=STEP, stream=STREAM):
    """The CPU core's update of rows on the CPU."""
    cases = zip(addresses(rows), SIZES, first_chunks(), rules, strict=True)
    _core.noisy_step(KEY, step, stream, [(*at, n, first, rule) for at, n, first, rule in cases], 1)


def assert_same_memory(rows, expected):
    """Bit for bit, with the nan around the tensors."""
    for i, (row, wanted) in enumerate(zip(rows, expected, strict=True)):
        for slot, (a, b) in enumerate(zip(row, wanted, strict=True)):
            assert (a is None) == (b is None)
            assert a is None or same_bits(around(a), around(b)), f"tensor {i} of {SIZES[i]}, slot {slot}"
