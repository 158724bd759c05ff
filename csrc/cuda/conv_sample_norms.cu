#include "cuda/conv_sample_norms.cuh"
#include "cuda/conv_sample_norms.h"
#include "cuda/machine.cuh"

namespace adaclip {
namespace cuda {
namespace {

// One tile a warp (up to 128 positions) leaves registers for several blocks on a multiprocessor; with more,
// the tiles of one sample fill its registers.
template <Element element, int warp_tiles>
__global__ void __launch_bounds__(kMostWarps * 32, 1)
    conv_norms(const __grid_constant__ ConvNormsPlan plan, const char* x, const char* g, double* sqnorms,
               double* magnitudes) {
  extern __shared__ __align__(128) char shared[];
  conv_norms_block<Machine, element, warp_tiles>(plan, x, g, sqnorms, magnitudes, shared);
}

using Kernel = void (*)(ConvNormsPlan, const char*, const char*, double*, double*);

template <Element element>
Kernel kernel_for(int warp_tiles) {
  return warp_tiles == 1 ? conv_norms<element, 1> : conv_norms<element, kMostWarpTiles>;
}

Kernel kernel_for(Element element, int warp_tiles) {
  switch (element) {
    case Element::bf16:
      return kernel_for<Element::bf16>(warp_tiles);
    case Element::fp16:
      return kernel_for<Element::fp16>(warp_tiles);
    default:
      return kernel_for<Element::fp32>(warp_tiles);
  }
}

cudaError_t shared_limit(int device, int* bytes) {
  return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

std::string says(cudaError_t error) {
  return std::string("the CUDA runtime says: ") + cudaGetErrorString(error);
}

}  // namespace

std::string device_refusal(int device) {
  cudaFuncAttributes found;
  cudaError_t error = cudaSetDevice(device);
  // Loads the code for that device, where there is some.
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&found, kernel_for(Element::bf16, 1));
  cudaGetLastError();  // or the next launch would find it
  return error == cudaSuccess ? "" : says(error);
}

std::string conv_sample_norms_refusal(const ConvShape& shape, int device) {
  if (device < 0) return conv_norms_refusal(shape, kAmpereShared);
  int limit = 0, major = 0;
  cudaError_t error = shared_limit(device, &limit);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return says(error);
  if (major < 8) return "the device has compute capability below 8.0";
  return conv_norms_refusal(shape, limit);
}

cudaError_t conv_sample_norms(const ConvShape& shape, Element element, const void* x, TensorStrides x_strides,
                              const void* g, TensorStrides g_strides, double* sqnorms, double* magnitudes,
                              int device, cudaStream_t stream) {
  if (shape.batch == 0) return cudaSuccess;
  // This runtime is linked statically: its current device is not that of torch's.
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  int limit = 0;
  error = shared_limit(device, &limit);
  if (error != cudaSuccess) return error;
  const int64_t x_steps[3] = {x_strides.sample, x_strides.channel, x_strides.position};
  const int64_t g_steps[3] = {g_strides.sample, g_strides.channel, g_strides.position};
  const ConvNormsPlan plan =
      conv_norms_plan(shape, element == Element::fp32 ? 4 : 2, reinterpret_cast<uintptr_t>(x), x_steps,
                      reinterpret_cast<uintptr_t>(g), g_steps, limit);
  const Kernel kernel = kernel_for(element, plan.warp_tiles);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error != cudaSuccess) return error;
  const int64_t blocks = (plan.batch + plan.samples - 1) / plan.samples;
  kernel<<<static_cast<unsigned>(blocks), plan.warps * 32, plan.shared_bytes, stream>>>(
      plan, static_cast<const char*>(x), static_cast<const char*>(g), sqnorms, magnitudes);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace adaclip
