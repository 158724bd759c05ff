#include "cuda/conv_norms_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace adaclip {
namespace cuda {
namespace {

float up(double v) {
  const float nearest = static_cast<float>(v);
  return nearest >= v ? nearest : std::nextafter(nearest, std::numeric_limits<float>::infinity());
}

int tiles_along(int64_t positions) { return static_cast<int>((positions + kTileSide - 1) / kTileSide); }

// Bytes of shared memory before the stages: K, and a word a row for positions, |x| and |g|.
int before_stages(int rows) { return triangle_row(rows) * 4 + 3 * rows * 4; }

// The part of the plan that depends on how one of the tensors lies in memory.
ConvNormsSide side(int element_bytes, uintptr_t address, const int64_t strides[3], int channels,
                   int positions) {
  const int per_piece = kPieceBytes / element_bytes;
  const bool vector = address % kPieceBytes == 0 && strides[1] == 1 && strides[0] % per_piece == 0 &&
                      strides[2] % per_piece == 0 && channels % per_piece == 0;
  return {strides[0], strides[1], strides[2], channels, positions, 0, vector, 0, 0};
}

// Fills in how a side is summed; returns eta: |entry - exact| <= eta * |x_t| |x_t'| where nothing underflows.
double sum_in_stages(ConvNormsSide& side, int stage_channels, bool split) {
  side.stages = (side.channels + stage_channels - 1) / stage_channels;
  const int products = (split ? 3 : 1) * stage_channels;
  const double eta =
      std::ldexp(products, -22) + std::ldexp(side.stages, -23) + (split ? std::ldexp(1, -18) : 0);
  // An addend that underflows, and an element that does, loses at most 2^-126.
  const double lost = std::ldexp(4.0 * products * side.stages, -126);
  side.grow = up(1 + 2 * eta);
  side.floor = up(lost / eta);
  return eta;
}

}  // namespace

std::string conv_norms_refusal(const ConvShape& s, int shared_limit) {
  if (s.in[0] != 1 || s.out[0] != 1 || s.kernel[0] != 1 || s.padding[0] != 0)
    return "it has three spatial dimensions";
  const int64_t in = s.in[1] * s.in[2], out = s.out[1] * s.out[2];
  if (in < 1 || out < 1 || s.kernel[1] * s.kernel[2] < 1) return "it has no positions";
  if (in > kMostRows || out > kMostRows)
    return "it has " + std::to_string(std::max(in, out)) + " positions, more than 256";
  if (s.kernel[1] > kMostTaps || s.kernel[2] > kMostTaps) return "its window is larger than 8 x 8";
  for (int a = 1; a < 3; ++a)
    if (s.stride[a] > 4096 || s.padding[a] > 4096 || s.dilation[a] > 4096)
      return "its stride, padding or dilation is above 4096";
  // The first tap of an output position is kept in 16 bits.
  const int64_t lowest = s.padding[1] * s.in[2] + s.padding[2];
  const int64_t highest = (s.out[1] - 1) * s.stride[1] * s.in[2] + (s.out[2] - 1) * s.stride[2];
  if (lowest > 32000 || highest > 32000) return "its padding or stride reaches too far outside of the image";
  const int64_t channels = std::max(s.in_channels, s.out_channels) / s.groups;
  if (channels < 1 || channels > (1 << 16)) return "it has no channels, or more than 65536 in a group";
  const int rows = tiles_along(std::max(in, out)) * kTileSide,
            least = before_stages(rows) + 4 * kPieceBytes * rows;
  if (least > shared_limit)
    return "it needs " + std::to_string(least) + " bytes of shared memory, and the device has " +
           std::to_string(shared_limit);
  return "";
}

ConvNormsPlan conv_norms_plan(const ConvShape& s, int element_bytes, uintptr_t x, const int64_t x_strides[3],
                              uintptr_t g, const int64_t g_strides[3], int shared_limit) {
  ConvNormsPlan p{};
  const bool split = element_bytes == 4;
  p.batch = s.batch;
  p.groups = static_cast<int>(s.groups);
  for (int a = 0; a < 2; ++a) {
    p.in[a] = static_cast<int>(s.in[a + 1]), p.out[a] = static_cast<int>(s.out[a + 1]);
    p.kernel[a] = static_cast<int>(s.kernel[a + 1]), p.stride[a] = static_cast<int>(s.stride[a + 1]);
    p.padding[a] = static_cast<int>(s.padding[a + 1]), p.dilation[a] = static_cast<int>(s.dilation[a + 1]);
  }
  p.taps = p.kernel[0] * p.kernel[1];
  const int in = p.in[0] * p.in[1], out = p.out[0] * p.out[1], most = std::max(in, out);
  p.x = side(element_bytes, x, x_strides, static_cast<int>(s.in_channels / s.groups), in);
  p.g = side(element_bytes, g, g_strides, static_cast<int>(s.out_channels / s.groups), out);

  p.side = tiles_along(most);
  p.tiles = p.side * (p.side + 1) / 2;
  p.row_bits = 8;
  p.samples = 1;
  if (p.side == 1) {
    for (p.row_bits = 0; (1 << p.row_bits) < most;) ++p.row_bits;
    p.samples = kTileSide >> p.row_bits;
  }
  p.warp_tiles = p.tiles <= kMostWarps ? 1 : kMostWarpTiles;
  p.warps = (p.tiles + p.warp_tiles - 1) / p.warp_tiles;

  const int rows = p.side * kTileSide;
  p.where_at = triangle_row(rows) * 4;
  p.x_norms_at = p.where_at + rows * 4;
  p.g_norms_at = p.x_norms_at + rows * 4;
  p.stages_at = before_stages(rows);
  // Long rows first (fewer barriers), then as many stages in flight as fit.
  for (p.pieces = 4; p.pieces > 1; p.pieces /= 2) {
    p.stage_bytes = rows * p.pieces * kPieceBytes;
    p.depth = std::min(4, (shared_limit - p.stages_at) / p.stage_bytes);
    if (p.depth >= 2) break;
  }
  p.shared_bytes = p.stages_at + p.depth * p.stage_bytes;

  const int stage_channels = p.pieces * kPieceBytes / element_bytes;
  const double eta_x = sum_in_stages(p.x, stage_channels, split);
  const double eta_g = sum_in_stages(p.g, stage_channels, split);
  p.round = p.x.stages + p.g.stages;
  p.steps = p.groups * p.round;
  p.relative = eta_x + eta_g + eta_x * eta_g + std::ldexp(p.taps + 16.0, -23) + std::ldexp(1, -40);
  p.absolute = std::ldexp(static_cast<double>(out) * out * p.groups, -148);
  return p;
}

}  // namespace cuda
}  // namespace adaclip
