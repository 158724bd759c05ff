// One pass over gradient, parameter and optimizer state: make the noise, add it, apply the update.
// Nothing of the model's size is written in between.
#pragma once

#include <cstdint>

#include "core/normal.h"

namespace adaclip {

// With n = grad + std * z, each optimizer is a choice of numbers in
//   g = sign * n + l2 * param
//   momentum = decay * momentum + keep * g                        (if it has momentum)
//   square = square_decay * square + square_keep * g^2            (if it has squares)
//   move = direct * g + follow * momentum
//   param = shrink * param - move / divisor
// where the divisor is 1 without squares; sqrt(square) * scale + eps with squares and floor_sq < 0; and
// else sqrt(max(square * scale - variance, floor_sq)) + eps, which takes the noise out of the squares.
struct StepRule {
  float std, sign, l2, shrink, decay, keep, direct, follow, square_decay, square_keep, scale, eps;
  float variance, floor_sq;
};

struct StepTensor {
  float* param;
  const float* grad;  // null: zeros
  float* momentum;    // null: none, and then `follow` is not used
  float* square;      // null: none; not without momentum
  int64_t n;
  int64_t first_chunk;  // of its noise
  StepRule rule;
};

// Tensors in order; each begins at the chunk where the one before ended. The caller keeps the last
// chunk <= kStreamChunks. No noise is made where std is 0.
void noisy_step(const Keystream& ks, const StepTensor* tensors, int64_t count, int threads);

}  // namespace adaclip
