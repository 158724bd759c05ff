// The block program of the convolution norms (conv_sample_norms.h). `M` is the machine: cuda::Machine, or the
// emulation in the tests; arithmetic, indices and barriers are the same there.
//
// Rows are positions: of one sample, or of several small ones behind each other. Channels stream through a
// ring of stages in shared memory [row][channel], first those of x, then those of g. A warp owns 32 x 32
// tiles of the lower triangle and keeps their sums in registers while the channels pass. K's tiles go to
// shared memory; each entry of S is multiplied where it is with its shifted sum of K. What lies in the
// triangle stays there when both positions are moved by one tap, so that half of K is enough.
#pragma once

#include <cmath>

#include "cuda/conv_norms_plan.h"
#include "cuda/device.h"

namespace adaclip {
namespace cuda {

// Where an output position's window begins, and which taps of it lie in the image: x << 8 | y as bits, below
// the (signed) row of the first tap.
struct Window {
  uint32_t word;
  ADACLIP_DEVICE bool has(int ky, int kx) const { return (word >> ky & word >> (8 + kx) & 1u) != 0; }
  ADACLIP_DEVICE int row(int shift) const { return (static_cast<int32_t>(word) >> 16) + shift; }
};

static ADACLIP_DEVICE Window window(const ConvNormsPlan& plan, int row) {
  const int in_sample = row & ((1 << plan.row_bits) - 1);
  if (in_sample >= plan.g.positions || row >> plan.row_bits >= plan.samples) return {0};
  const int y = in_sample / plan.out[1] * plan.stride[0] - plan.padding[0];
  const int x = in_sample % plan.out[1] * plan.stride[1] - plan.padding[1];
  uint32_t ys = 0, xs = 0;
  for (int k = 0; k < plan.kernel[0]; ++k) {
    const int at = y + k * plan.dilation[0];
    if (at >= 0 && at < plan.in[0]) ys |= 1u << k;
  }
  for (int k = 0; k < plan.kernel[1]; ++k) {
    const int at = x + k * plan.dilation[1];
    if (at >= 0 && at < plan.in[1]) xs |= 1u << k;
  }
  const int first = row - in_sample + y * plan.in[1] + x;
  return {static_cast<uint32_t>(first) << 16 | xs << 8 | ys};
}

// Byte of 16-byte piece `piece` of a row of a stage. Rows of 64 or 32 bytes: the piece is permuted so that
// eight rows in a row lie in different banks.
static ADACLIP_DEVICE int piece_at(int pieces, int row, int piece) {
  const int turn = (pieces == 4 ? row >> 1 : row >> 2) & (pieces - 1);
  return (row * pieces + (piece ^ turn)) * kPieceBytes;
}

struct Tile {
  int row, column;
};

// The tiles of the lower triangle, row by row.
static ADACLIP_DEVICE Tile find_tile(int index) {
  int row = 0;
  while ((row + 1) * (row + 2) / 2 <= index) ++row;
  return {row, index - row * (row + 1) / 2};
}

// Where a lane's entries of a 16 x 8 product lie. The product's column n is position column_of(n), so that
// the four lanes of a row hold neighbors: see triangle_row.
static ADACLIP_DEVICE int column_of(int n) { return (n >> 1) + 4 * (n & 1); }
static ADACLIP_DEVICE int entry_row(int lane, int block, int reg) {
  return 16 * block + (lane >> 2) + 8 * (reg >> 1);
}
static ADACLIP_DEVICE int entry_column(int lane, int strip, int reg) {
  return 8 * strip + (lane & 3) + 4 * (reg & 1);
}

// One stage of one side: the channels from stage * (channels in a stage) on, of every row of the block.
template <typename M, int bytes>
ADACLIP_DEVICE void load_stage(const ConvNormsPlan& plan, const ConvNormsSide& side, const char* from,
                               int64_t first, int group, int stage, char* to, int thread) {
  constexpr int kPerPiece = kPieceBytes / bytes, kPerWord = 4 / bytes;
  const int threads = plan.warps * 32, rows = plan.side * kTileSide, mask = (1 << plan.row_bits) - 1;
  const int begin = stage * plan.pieces * kPerPiece;
  const int64_t channel = static_cast<int64_t>(group) * side.channels;
  if (side.vector) {
#pragma unroll 1
    for (int i = thread; i < rows * plan.pieces; i += threads) {
      const int row = i / plan.pieces, piece = i % plan.pieces, slot = row >> plan.row_bits, t = row & mask;
      const int c = begin + piece * kPerPiece;
      const bool valid =
          t < side.positions && slot < plan.samples && first + slot < plan.batch && c < side.channels;
      const int64_t at = (first + slot) * side.sample + (channel + c) + t * side.position;
      M::copy16(to + piece_at(plan.pieces, row, piece), valid ? from + at * bytes : from, valid);
    }
    return;
  }
  // Rows advance fastest: positions are next to each other in a contiguous tensor.
#pragma unroll 1
  for (int i = thread; i < rows * plan.pieces * 4; i += threads) {
    const int row = i % rows, word = i / rows, slot = row >> plan.row_bits, t = row & mask;
    uint32_t value = 0;
    if (t < side.positions && slot < plan.samples && first + slot < plan.batch) {
      const int64_t at = (first + slot) * side.sample + t * side.position;
      for (int k = 0; k < kPerWord; ++k) {
        const int c = begin + word * kPerWord + k;
        if (c >= side.channels) break;
        const char* element = from + (at + (channel + c) * side.channel) * bytes;
        if constexpr (bytes == 4) {
          value = *reinterpret_cast<const uint32_t*>(element);
        } else {
          value |= static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(element)) << (16 * k);
        }
      }
    }
    *reinterpret_cast<uint32_t*>(to + piece_at(plan.pieces, row, word / 4) + word % 4 * 4) = value;
  }
}

// The high 11 bits of a float32, and of what they leave: both are exact tf32 numbers. A value that is not
// finite leaves NaN.
template <typename M>
ADACLIP_DEVICE void split(uint32_t v, uint32_t& high, uint32_t& low) {
  high = v & 0xffffe000u;
  low = M::bits(M::value(v) - M::value(high)) & 0xffffe000u;
}

template <typename M, Element element>
ADACLIP_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&a_low)[4], uint32_t b0,
                             uint32_t b1) {
  if constexpr (element == Element::bf16) {
    M::multiply_bf16(d, a, b0, b1);
  } else if constexpr (element == Element::fp16) {
    M::multiply_fp16(d, a, b0, b1);
  } else {
    uint32_t h0, l0, h1, l1;
    split<M>(b0, h0, l0), split<M>(b1, h1, l1);
    M::multiply_tf32(d, a_low, h0, h1);
    M::multiply_tf32(d, a, l0, l1);
    M::multiply_tf32(d, a, h0, h1);
  }
}

// sum[block][strip] of a tile (+)= the stage's channels of its rows and columns. A stage is summed by itself
// first: how far a sum is off then depends on the length of a stage, not on the number of channels.
template <typename M, Element element>
ADACLIP_DEVICE void multiply_stage(const char* stage, int pieces, Tile tile, int lane, bool fresh,
                                   float (&sum)[2][4][4]) {
  // fp32 takes 16 rows at a time and reads its columns twice: registers are scarcer there than shared memory
  // is slow.
  constexpr int kAtOnce = element == Element::fp32 ? 1 : 2;
  const int a_row = tile.row * kTileSide + (lane & 15);
  const int b_row = tile.column * kTileSide + 8 * (lane >> 4) + column_of(lane & 7);
#pragma unroll
  for (int first = 0; first < 2; first += kAtOnce) {
    float part[kAtOnce][4][4] = {};
#pragma unroll 1
    for (int piece = 0; piece < pieces; piece += 2) {
      uint32_t b[2][4];
#pragma unroll
      for (int h = 0; h < 2; ++h)
        M::load_matrices(b[h], stage + piece_at(pieces, b_row + 16 * h, piece + (lane >> 3 & 1)));
#pragma unroll
      for (int block = 0; block < kAtOnce; ++block) {
        uint32_t a[4], low[4] = {};
        M::load_matrices(a, stage + piece_at(pieces, a_row + 16 * (first + block), piece + (lane >> 4)));
        if constexpr (element == Element::fp32) {
#pragma unroll
          for (int i = 0; i < 4; ++i) split<M>(a[i], a[i], low[i]);
        }
#pragma unroll
        for (int strip = 0; strip < 4; ++strip)
          multiply<M, element>(part[block][strip], a, low, b[strip / 2][strip % 2 * 2],
                               b[strip / 2][strip % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce * 16; ++i) {
      float& to = sum[first + i / 16][i / 4 % 4][i % 4];
      to = (fresh ? 0.0f : to) + part[i / 16][i / 4 % 4][i % 4];
    }
  }
}

// Upper bounds of the positions' norms, from the diagonal of a Gram matrix.
template <typename M>
ADACLIP_DEVICE void store_norms(const ConvNormsSide& side, int tile_row, int lane,
                                const float (&sum)[2][4][4], float* norms) {
  // A lane has an entry of the diagonal in each eight rows, or none.
  const int odd = lane >> 4;
  if ((lane >> 2 & 3) != (lane & 3)) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float v = odd ? sum[i / 2][i][i % 2 * 2 + 1] : sum[i / 2][i][i % 2 * 2];
    norms[tile_row * kTileSide + 8 * i + (lane >> 2)] = M::sqrt_up(M::fma_up(v, side.grow, side.floor));
  }
}

ADACLIP_DEVICE void store_tile(Tile tile, int lane, const float (&sum)[2][4][4], float* k) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int row = tile.row * kTileSide + entry_row(lane, i / 16, i % 4);
    const int column = tile.column * kTileSide + entry_column(lane, i / 4 % 4, i % 4);
    if (column <= row) k[triangle_row(row) + column] = sum[i / 16][i / 4 % 4][i % 4];
  }
}

// Adds to totals[j], row entry_row(lane, j / 2, 2 (j % 2)) of the tile: sum over its columns of S times the
// shifted sum of K, an entry below the diagonal counting for both triangles. count = 1: all rows to
// totals[0].
template <int count>
ADACLIP_DEVICE void multiply_shifted(const ConvNormsPlan& plan, Tile tile, int lane,
                                     const float (&s)[2][4][4], const Window* windows, const float* k,
                                     double (&totals)[count]) {
  // Two rows by four columns at a time: more would not fit into registers beside the tiles.
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    const int block = part / 2, strip = part % 2 * 2;
    const int row = tile.row * kTileSide + entry_row(lane, block, 0);
    const int column = tile.column * kTileSide + entry_column(lane, strip, 0);
    const Window upper = windows[row], lower = windows[row + 8];
    Window columns[4];
    float u[2][4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) columns[j] = windows[column + 4 * j];
#pragma unroll 1
    for (int ky = 0; ky < plan.kernel[0]; ++ky)
#pragma unroll 1
      for (int kx = 0; kx < plan.kernel[1]; ++kx) {
        const int shift = ky * plan.dilation[0] * plan.in[1] + kx * plan.dilation[1];
        const bool has_upper = upper.has(ky, kx), has_lower = lower.has(ky, kx);
        const float* k_upper = k + triangle_row(has_upper ? upper.row(shift) : 0);
        const float* k_lower = k + triangle_row(has_lower ? lower.row(shift) : 0);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const bool has = columns[j].has(ky, kx);
          const int at = columns[j].row(shift);
          if (has && has_upper) u[0][j] += k_upper[at];
          if (has && has_lower) u[1][j] += k_lower[at];
        }
      }
    // Above the diagonal, and between samples of a block, u is made of what K does not say: it is not used.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 8 * half;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int c = column + 4 * j;
        const float entry = s[block][strip + j / 2][j % 2 + 2 * half];
        if (c > r || (r ^ c) >> plan.row_bits != 0) continue;
        sum = fmaf(c == r ? entry : 2 * entry, u[half][j], sum);
      }
      totals[(2 * block + half) % count] += static_cast<double>(sum);
    }
  }
}

// This warp's taps of sum_tap (sum_t |g_t| |x_pos(t, tap)|)^2, rounded up; the same in all `lanes` of a
// sample.
template <typename M>
ADACLIP_DEVICE double magnitude(const ConvNormsPlan& plan, int warp, int lane, int lanes,
                                const Window* windows, const float* x_norms, const float* g_norms) {
  double total = 0;
#pragma unroll 1
  for (int tap = warp; tap < plan.taps; tap += plan.warps) {
    const int ky = tap / plan.kernel[1], kx = tap % plan.kernel[1];
    const int shift = ky * plan.dilation[0] * plan.in[1] + kx * plan.dilation[1];
    float sum = 0;
    for (int row = lane; row < plan.side * kTileSide; row += 32) {
      const Window w = windows[row];
      if (w.has(ky, kx)) sum = M::fma_up(g_norms[row], x_norms[w.row(shift)], sum);
    }
    for (int step = 1; step < lanes; step *= 2) sum = M::add_up(sum, M::shuffle_xor(sum, step));
    total += static_cast<double>(sum) * static_cast<double>(sum);
  }
  return total;
}

// Adds a group to the block's samples, in a fixed order: rows, warps, lanes, groups. Behind the last group
// sqnorms become upper bounds; until then outputs hold what was summed so far. totals: see multiply_shifted;
// scratch: [warps][2][32].
template <typename M, int count>
ADACLIP_DEVICE void add_group(const ConvNormsPlan& plan, double (&totals)[count], int thread, int64_t first,
                              bool is_first, bool is_last, const Window* windows, const float* x_norms,
                              const float* g_norms, double* scratch, double* sqnorms, double* magnitudes) {
  const int warp = thread >> 5, lane = thread & 31;
  const int lanes = plan.row_bits < 5 ? 1 << plan.row_bits : 32;  // of a sample
  double* row_totals = scratch + warp * 64;
  row_totals[32 + lane] = magnitude<M>(plan, warp, lane, lanes, windows, x_norms, g_norms);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    double total = 0;
    if (j < count) {
      total = totals[j] + M::shuffle_xor(totals[j], 1);
      total += M::shuffle_xor(total, 2);
    }
    if ((lane & 3) == 0) row_totals[entry_row(lane, j / 2, j % 2 * 2)] = total;
  }
  M::barrier();
  if (warp != 0) return;
  double total = 0, bound = 0;
  for (int w = 0; w < plan.warps; ++w) {
    total += scratch[w * 64 + lane];
    bound += scratch[w * 64 + 32 + lane];
  }
  for (int step = 1; step < lanes; step *= 2) total += M::shuffle_xor(total, step);
  const int slot = lane >> plan.row_bits;
  if (lane % lanes != 0 || slot >= plan.samples || first + slot >= plan.batch) return;
  if (!is_first) {
    total += sqnorms[first + slot];
    bound += magnitudes[first + slot];
  }
  if (is_last) {
    bound *= 1 + 0x1p-40;
    // Written so that NaN stays NaN.
    total = (total < 0 ? 0.0 : total) + plan.relative * bound + plan.absolute;
  }
  sqnorms[first + slot] = total;
  magnitudes[first + slot] = bound;
}

// The whole block. shared: plan.shared_bytes, contents undefined. Which thread and block this is, addresses
// in shared memory and tiles are found anew wherever they are needed (`opaque`): what is kept from stage to
// stage beside the tiles would spill.
template <typename M, Element element, int warp_tiles>
ADACLIP_DEVICE void conv_norms_block(const ConvNormsPlan& plan, const char* x, const char* g, double* sqnorms,
                                     double* magnitudes, char* shared) {
  constexpr int kBytes = element == Element::fp32 ? 4 : 2;
  auto part_of = [&](int offset) { return shared + M::opaque(offset); };
  auto words_at = [&](int offset) { return reinterpret_cast<float*>(part_of(offset)); };
  auto windows = [&] { return reinterpret_cast<Window*>(part_of(plan.where_at)); };
  auto thread = [] { return M::opaque(M::thread()); };
  auto first = [&] { return static_cast<int64_t>(M::opaque(M::block())) * plan.samples; };
  for (int row = thread(); row < plan.side * kTileSide; row += plan.warps * 32)
    windows()[row] = window(plan, row);

  auto load = [&](int index) {
    if (index < plan.steps) {
      const int group = index / plan.round, stage = index % plan.round;
      char* to = part_of(plan.stages_at) + index % plan.depth * plan.stage_bytes;
      if (stage < plan.x.stages) {
        load_stage<M, kBytes>(plan, plan.x, x, first(), group, stage, to, thread());
      } else {
        load_stage<M, kBytes>(plan, plan.g, g, first(), group, stage - plan.x.stages, to, thread());
      }
    }
    M::commit();  // an empty group too: `wait` counts them
  };
  for (int index = 0; index + 1 < plan.depth; ++index) load(index);

  // Rows are told apart where a block has several samples; registers are scarce where it has not.
  constexpr int kTotals = warp_tiles == 1 ? 4 : 1;
  float sum[warp_tiles][2][4][4];
  for (int index = 0; index < plan.steps; ++index) {
    M::wait(plan.depth - 2);
    M::barrier();  // stage `index` is here, and everybody is done with the one before it
    load(index + plan.depth - 1);
    char* stage = part_of(plan.stages_at) + index % plan.depth * plan.stage_bytes;
    const int step = index % plan.round;
    const bool fresh = step == 0 || step == plan.x.stages;
    const bool last_x = step + 1 == plan.x.stages, last_g = step + 1 == plan.round;
#pragma unroll
    for (int i = 0; i < warp_tiles; ++i) {
      const int own = thread(), tile = (own >> 5) * warp_tiles + i;
      multiply_stage<M, element>(stage, plan.pieces, find_tile(tile < plan.tiles ? tile : 0), own & 31, fresh,
                                 sum[i]);
    }
    if (!last_x && !last_g) continue;
    double totals[kTotals] = {};
#pragma unroll
    for (int i = 0; i < warp_tiles; ++i) {
      const int own = thread(), tile = (own >> 5) * warp_tiles + i, lane = own & 31;
      if (tile >= plan.tiles) continue;
      const Tile at = find_tile(tile);
      if (at.row == at.column)
        store_norms<M>(last_x ? plan.x : plan.g, at.row, lane, sum[i],
                       words_at(last_x ? plan.x_norms_at : plan.g_norms_at));
      if (last_x) {
        store_tile(at, lane, sum[i], words_at(0));
      } else {
        multiply_shifted(plan, at, lane, sum[i], windows(), words_at(0), totals);
      }
    }
    if (!last_g) continue;
    M::barrier();  // norms are there, and nobody reads the stage: it is free until the next barrier
    add_group<M>(plan, totals, thread(), first(), index < plan.round, index + 1 == plan.steps, windows(),
                 words_at(plan.x_norms_at), words_at(plan.g_norms_at), reinterpret_cast<double*>(stage),
                 sqnorms, magnitudes);
  }
}

}  // namespace cuda
}  // namespace adaclip
