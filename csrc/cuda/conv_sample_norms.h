// Per-sample squared norms of a convolution's weight gradient on a GPU, by shifted Gram matrices:
//   sqnorm = sum_{t,t'} S[t,t'] * sum_tap K[pos(t,tap), pos(t',tap)],   K = X^T X,  S = G^T G
// over the channels of a group. One block takes one sample, or several small ones: both Gram matrices come
// from tensor cores, K stays in shared memory, S in registers, and nothing of size T^2 leaves the chip.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "core/conv_geometry.h"
#include "cuda/conv_norms_plan.h"

namespace adaclip {
namespace cuda {

// In elements. Positions of a channel plane are equally far apart: contiguous and channels_last tensors,
// and whatever else keeps rows next to each other.
struct TensorStrides {
  int64_t sample, channel, position;
};

// Empty if the kernels of this library can run on `device`, else why not: the driver may be older than the
// runtime that is linked in, or the library built for other GPUs. `device` becomes the current one.
std::string device_refusal(int device);

// Empty if the kernel can take this shape on `device`, else why not: it is for planes of up to 256 positions
// (input and output) and windows of up to 8 x 8, in one or two dimensions, from compute capability 8.0 on.
// device -1: on an A100 or newer data center GPU; nothing is asked of a driver.
std::string conv_sample_norms_refusal(const ConvShape& shape, int device);

// x [B, Cin, H, W], g [B, Cout, H', W'] on `device`, both of `element`; sqnorms, magnitudes: double [B], all
// written. Strides of channel 1 in multiples of 16 bytes (channels_last) are copied in asynchronously 16
// bytes at a time; any others element by element.
//
// sqnorms bound the exact squared norm of what the inputs say from above, and exceed it by at most
// 2 * relative * magnitudes + a denormal (ConvNormsPlan::relative says what that is made of). magnitudes
// bound `reference.position_norms_product` from above. Results are bitwise repeatable and do not depend on
// the other samples. A sample that is not finite, or whose Gram matrices overflow float32 (|x_t| or |g_t|
// above 1.8e19), gets norms that are not finite and touches no other.
//
// Returns what the CUDA runtime says to the launch; the shape must not be one that is refused.
cudaError_t conv_sample_norms(const ConvShape& shape, Element element, const void* x, TensorStrides x_strides,
                              const void* g, TensorStrides g_strides, double* sqnorms, double* magnitudes,
                              int device, cudaStream_t stream);

}  // namespace cuda
}  // namespace adaclip
