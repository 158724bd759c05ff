"""The CUDA C++ noisy step, built for the CPU: every bit is the core's. (tests of the build look at its machine code.)"""

import ctypes

import pytest
import torch
from cuda_on_host import build
from noise_cases import (
    ROUNDS,
    SIZES,
    STREAM,
    addresses,
    assert_same_memory,
    core_step,
    device_key,
    first_chunks,
    step_case,
)

from adaclip.kernels.step_table import TILE_CHUNKS, StepTable

CPU = torch.device("cpu")

CALLS = """
extern "C" {
int step(const uint32_t* key, const uint64_t* step, uint32_t stream, const int64_t* pointers, const int64_t* numel,
         const int64_t* first_chunk, const adaclip::StepRule* rules, const int32_t* tiles, int64_t tile_count) {
  misaligned_accesses = wide_accesses = 0;
  return adaclip::cuda::noisy_step({key, step, stream}, {pointers, numel, first_chunk, rules, tiles, tile_count}, 0);
}
int64_t misaligned() { return misaligned_accesses; }
int64_t wide() { return wide_accesses; }
int tile_chunks() { return adaclip::cuda::kTileChunks; }
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    library = build("noisy_step", CALLS, tmp_path_factory.mktemp("noisy_step"))
    library.misaligned.restype = library.wide.restype = ctypes.c_int64
    return library


def _run(kernel, rows, rules, sizes, first):
    table = StepTable.make(addresses(rows), sizes, first, rules, CPU)
    key, step = device_key(CPU)
    arrays = [table.pointers, table.numel, table.first_chunk, table.rules, table.tiles]
    where = [ctypes.c_void_p(t.data_ptr()) for t in (key, step, *arrays)]
    count = ctypes.c_int64(len(table.tiles))
    assert kernel.step(*where[:2], ctypes.c_uint32(STREAM), *where[2:], count) == 0
    assert kernel.misaligned() == 0


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("round", ROUNDS)
def test_updates_have_the_cores_bits(round, offset, kernel):
    rows, rules = step_case(round, CPU, offset)
    expected, _ = step_case(round, CPU, offset)
    _run(kernel, rows, rules, SIZES, first_chunks())
    core_step(expected, rules)
    assert_same_memory(rows, expected)


def test_only_whole_aligned_parts_go_16_bytes_at_a_time(kernel):
    rule = [0.5, 1.0, 0.0, 1.0, 0.0, 1.0, 0.1, *[0.0] * 6, -1.0]
    room = torch.zeros(2, 4000)
    for offset, n, whole in ((0, 639, 0), (0, 640, 1), (0, 2560 + 700, 5), (4, 640, 1), (1, 3000, 0)):
        rows = [[room[0, offset:], room[1, offset:], None, None]]
        _run(kernel, rows, [rule], [n], [0])
        assert kernel.wide() == whole * 640 // 4 * 3  # parameter and gradient read, parameter written


def test_the_tables_tiles_are_the_kernels(kernel):
    assert kernel.tile_chunks() == TILE_CHUNKS
