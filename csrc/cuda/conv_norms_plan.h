// What one launch of the convolution norms looks like: sizes, shared memory and error bounds. Plain C++: the
// host makes it, the kernel and the emulation in the tests read it.
#pragma once

#include <cstdint>
#include <string>

#include "core/conv_geometry.h"
#include "cuda/device.h"

namespace adaclip {
namespace cuda {

enum class Element : int { bf16 = 0, fp16 = 1, fp32 = 2 };

constexpr int kTileSide = 32;  // a warp's tile of a Gram matrix
constexpr int kMostWarps = 12;
constexpr int kMostWarpTiles = 3;  // times kMostWarps: the half of a 256 x 256 matrix
constexpr int kMostRows = 256;     // positions of a plane
constexpr int kMostTaps = 8;       // along one axis: a byte of validity bits
constexpr int kPieceBytes = 16;    // what is copied at once

// Where row `row` of K's lower triangle begins, in floats. Row lengths are 4, 36, 68, ... floats: long
// enough, and 4 modulo 32, so that eight rows of four neighboring columns (what a warp touches at once) lie
// in 32 banks.
ADACLIP_HOST_DEVICE constexpr int triangle_row(int row) {
  const int block = (row + 28) / 32;
  return block == 0 ? 4 * row
                    : 16 + 128 * (block - 1) + 512 * block * (block - 1) +
                          (row + 28 - 32 * block) * (4 + 32 * block);
}

struct ConvNormsSide {
  int64_t sample, channel, position;  // strides in elements
  int channels, positions;            // of one group
  int stages;                         // pieces that the channels are read in
  bool vector;                        // 16-byte asynchronous copies
  // A computed squared norm v of a position becomes v * grow + floor, rounded up: at least the exact one, and
  // large enough that `eta * floor` covers what underflow can take from an entry of the Gram matrix.
  float grow, floor;
};

struct ConvNormsPlan {
  int64_t batch;
  int groups, taps;
  int in[2], out[2], kernel[2], stride[2], padding[2], dilation[2];
  ConvNormsSide x, g;
  // A block's rows: samples one after the other, 1 << row_bits rows each (one sample if there are over 32).
  int row_bits, samples, side, tiles;  // side: tiles along the matrix
  int warps, warp_tiles;               // tiles a warp owns at most
  int round, steps;                    // stages of x and g of one group, and of all groups
  int pieces, depth;                   // 16-byte pieces of a row in a stage (2 or 4); stages in shared memory
  int stage_bytes, where_at, x_norms_at, g_norms_at, stages_at, shared_bytes;  // K is at 0
  // |computed - exact| <= relative * magnitude + absolute, for the sum before it is raised by both:
  //   an entry of K or S is a sum over channels. A stage's products are summed by the tensor cores, which
  //   truncate every addend to 24 bits of the largest and the result: at most 2^-22 a product of sum_c |x_c
  //   x'_c|
  //   <= |x_t| |x_t'|. Stages are added in float32, 2^-24 each. fp32 elements are split into two 11-bit
  //   parts, with 3 products instead of one, and 2^-18 for what is left out. Then taps + 8 float32 roundings
  //   of sums and products, and double.
  double relative, absolute;
};

constexpr int kAmpereShared = 163 * 1024;  // bytes of shared memory that a block may have on sm_80

// Empty if there is a plan for a device whose blocks may have `shared_limit` bytes of shared memory, else why
// not.
std::string conv_norms_refusal(const ConvShape& shape, int shared_limit);

// element_bytes: 2 or 4. x, g: addresses (their alignment decides how they are read). Strides {sample,
// channel, position} in elements. The shape must not be one that is refused.
ConvNormsPlan conv_norms_plan(const ConvShape& shape, int element_bytes, uintptr_t x,
                              const int64_t x_strides[3], uintptr_t g, const int64_t g_strides[3],
                              int shared_limit);

}  // namespace cuda
}  // namespace adaclip
