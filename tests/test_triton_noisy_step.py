"""The multi-tensor kernels: every bit of the update and of the moved parameters is the CPU core's."""

import pytest
import torch
from noise_cases import (
    KEY,
    ROUNDS,
    SIZES,
    STEP,
    STREAM,
    addresses,
    assert_same_memory,
    core_step,
    device_key,
    first_chunks,
    placed,
    spread,
    step_case,
)

from adaclip import _core

pytest.importorskip("triton")

from adaclip.kernels.noisy_step import noisy_step
from adaclip.kernels.perturb import perturb
from adaclip.kernels.step_table import TILE_CHUNKS, StepTable

CPU = torch.device("cpu")


@pytest.mark.parametrize("round", ROUNDS)
def test_updates_have_the_cores_bits(round, gpu_or_interpreter):
    offset = round % 2
    rows, rules = step_case(round, gpu_or_interpreter, offset)
    expected, _ = step_case(round, CPU, offset)
    table = StepTable.make(addresses(rows), SIZES, first_chunks(), rules, gpu_or_interpreter)
    noisy_step(*device_key(gpu_or_interpreter), STREAM, table)
    core_step(expected, rules)
    assert_same_memory(rows, expected)


def test_a_step_counter_and_rules_that_move_on_the_device_move_the_noise(gpu_or_interpreter):
    param = torch.zeros(100, device=gpu_or_interpreter)
    rule = [1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, *[0.0] * 6, -1.0]
    table = StepTable.make([[param.data_ptr(), 0, 0, 0]], [100], [3], [rule], gpu_or_interpreter)
    key, step = device_key(gpu_or_interpreter, (1 << 32) - 1)
    noisy_step(key, step, 7, table)
    step += 1
    table.rules[:, 0] = 0.25
    noisy_step(key, step, 7, table)
    z = torch.zeros(2, 100)
    for i in range(2):
        _core.normal_fill(KEY, (1 << 32) - 1 + i, 7, 3, z[i].data_ptr(), 100, 1.0, False, 1)
    assert torch.equal(param.cpu(), -z[0] - 0.25 * z[1])


@pytest.mark.parametrize("sizes", [[], [0, 0]])
def test_a_table_without_elements_is_no_launch(sizes, gpu_or_interpreter):
    nothing = [[0, 0, 0, 0]] * len(sizes)
    table = StepTable.make(nothing, sizes, sizes, [[1.0] * 14] * len(sizes), gpu_or_interpreter)
    assert table.tiles.shape == (0, 2)
    noisy_step(*device_key(gpu_or_interpreter), 0, table)
    perturb(*device_key(gpu_or_interpreter), 0, table, True, 1.0)


def test_tiles_cover_every_chunk_once():
    sizes = [1, 0, 160 * TILE_CHUNKS, 160 * TILE_CHUNKS + 1, 160 * 1000 + 7]
    table = StepTable.make([[0] * 4] * 5, sizes, [0] * 5, [[0.0]] * 5, CPU)
    assert [table.tiles[table.tiles[:, 0] == i, 1].tolist() for i in range(5)] == [
        list(range(0, -(-n // 160), TILE_CHUNKS)) for n in sizes
    ]


def _moves(device, without):
    """(rows of [param, out, shift, direction], numbers)."""
    rows = [
        [placed(spread(n, 10 * i + slot), device, i % 2) for slot in range(4)] for i, n in enumerate(SIZES)
    ]
    for i, row in enumerate(rows):
        row[1].fill_(float("nan"))
        if i in without:
            row[2] = None
        if i % 3 == 2:
            row[3] = None
    return rows, [(0.05 + i, 0.7 - i) for i in range(len(SIZES))]


@pytest.mark.parametrize(("draw", "sign"), [(True, 1.0), (True, -1.0), (False, -1.0)])
def test_moved_parameters_have_the_cores_bits(draw, sign, gpu_or_interpreter):
    without = {2, 4} if sign < 0 else {3}
    rows, numbers = _moves(gpu_or_interpreter, without)
    expected, _ = _moves(CPU, without)
    table = StepTable.make(addresses(rows), SIZES, first_chunks(), numbers, gpu_or_interpreter)
    perturb(*device_key(gpu_or_interpreter), STREAM, table, draw, sign)
    cases = zip(addresses(expected), SIZES, first_chunks(), numbers, strict=True)
    moved = [(*at, n, first, *pair) for at, n, first, pair in cases]
    _core.perturb(KEY, STEP, STREAM, moved, draw, sign, 1)
    assert_same_memory(rows, expected)
