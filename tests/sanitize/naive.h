// One sample's gradients as they are defined, in double.
#pragma once

#include <vector>

#include "core/conv_geometry.h"

namespace checks {

struct Gradient {
  std::vector<double> gradient, absolute;  // absolute: the sum of the products' absolute values
  double sqnorm = 0, magnitude = 0;
};

// Of a convolution's weight: x [in_channels, in...], g [out_channels, out...].
Gradient conv_gradient(const adaclip::ConvShape& shape, const float* x, const float* g);

// Of a linear layer's: a [positions, in], g [positions, out].
Gradient linear_gradient(int64_t positions, int64_t in, int64_t out, const float* a, const float* g);

}  // namespace checks
