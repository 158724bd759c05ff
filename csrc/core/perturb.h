// The point that gradients are taken at, made in one pass over the parameters.
#pragma once

#include <cstdint>

#include "core/normal.h"

namespace adaclip {

// shift = std * z                                    (made if `draw`, else read as it is)
// out = param + sign * shift + length * direction
struct PerturbTensor {
  const float* param;
  float* out;
  float* shift;            // null: no shift
  const float* direction;  // null: none
  int64_t n;
  int64_t first_chunk;  // of its z
  float std, length;
};

// Tensors in order; each begins at the chunk where the one before ended. The caller keeps the last
// chunk <= kStreamChunks.
void perturb(const Keystream& ks, const PerturbTensor* tensors, int64_t count, bool draw, float sign,
             int threads);

}  // namespace adaclip
