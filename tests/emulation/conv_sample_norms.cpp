// csrc/cuda/conv_sample_norms.cuh on the emulated machine, for tests/test_cuda_conv_emulated.py.
#include "cuda/conv_sample_norms.cuh"

#include "cuda_emulator.h"

namespace {

using adaclip::ConvShape;
using adaclip::cuda::ConvNormsPlan;
using adaclip::cuda::Element;

// sizes: batch, channels in and out, then in, out, kernel, stride, padding, dilation (3 each), groups.
ConvShape shape_of(const int64_t* sizes) {
  ConvShape s{sizes[0], sizes[1], sizes[2], {}, {}, {}, {}, {}, {}, sizes[21]};
  for (int a = 0; a < 3; ++a) {
    s.in[a] = sizes[3 + a], s.out[a] = sizes[6 + a], s.kernel[a] = sizes[9 + a];
    s.stride[a] = sizes[12 + a], s.padding[a] = sizes[15 + a], s.dilation[a] = sizes[18 + a];
  }
  return s;
}

template <Element element, int warp_tiles>
std::string run_block(const ConvNormsPlan& plan, emulation::Block& block, const char* x, const char* g,
                      double* sqnorms, double* magnitudes) {
  return block.run([&] {
    adaclip::cuda::conv_norms_block<emulation::Emulated, element, warp_tiles>(plan, x, g, sqnorms, magnitudes,
                                                                              block.shared);
  });
}

template <Element element>
std::string run_block(const ConvNormsPlan& plan, emulation::Block& block, const char* x, const char* g,
                      double* sqnorms, double* magnitudes) {
  return plan.warp_tiles == 1
             ? run_block<element, 1>(plan, block, x, g, sqnorms, magnitudes)
             : run_block<element, adaclip::cuda::kMostWarpTiles>(plan, block, x, g, sqnorms, magnitudes);
}

void say(const std::string& text, char* message, int size) {
  std::strncpy(message, text.c_str(), size - 1);
  message[size - 1] = 0;
}

}  // namespace

extern "C" {

// Writes why there is no plan to message, or an empty string.
void conv_norms_refusal(const int64_t* sizes, int shared_limit, char* message, int size) {
  say(adaclip::cuda::conv_norms_refusal(shape_of(sizes), shared_limit), message, size);
}

// strides: sample, channel, position. extents: elements of x and g. facts: the plan's relative and absolute
// error, shared bytes, warps, tiles a warp, samples a block, stages, pieces and whether x and g go 16 bytes
// at a time.
void conv_norms(const int64_t* sizes, int element, const char* x, const int64_t* x_strides, const char* g,
                const int64_t* g_strides, const int64_t* extents, int shared_limit, int early, unsigned seed,
                double* sqnorms, double* magnitudes, double* facts, char* message, int size) {
  const int bytes = element == static_cast<int>(Element::fp32) ? 4 : 2;
  const ConvNormsPlan plan =
      adaclip::cuda::conv_norms_plan(shape_of(sizes), bytes, reinterpret_cast<uintptr_t>(x), x_strides,
                                     reinterpret_cast<uintptr_t>(g), g_strides, shared_limit);
  const double told[] = {plan.relative,
                         plan.absolute,
                         static_cast<double>(plan.shared_bytes),
                         static_cast<double>(plan.warps),
                         static_cast<double>(plan.warp_tiles),
                         static_cast<double>(plan.samples),
                         static_cast<double>(plan.depth),
                         static_cast<double>(plan.pieces),
                         static_cast<double>(plan.x.vector),
                         static_cast<double>(plan.g.vector)};
  std::memcpy(facts, told, sizeof told);
  say("", message, size);
  for (int64_t b = 0; b * plan.samples < plan.batch; ++b) {
    emulation::Block block(static_cast<int>(b), plan.warps * 32, plan.shared_bytes, early != 0, seed + b);
    block.global_ranges = {{x, x + extents[0] * bytes}, {g, g + extents[1] * bytes}};
    std::string error;
    switch (static_cast<Element>(element)) {
      case Element::bf16:
        error = run_block<Element::bf16>(plan, block, x, g, sqnorms, magnitudes);
        break;
      case Element::fp16:
        error = run_block<Element::fp16>(plan, block, x, g, sqnorms, magnitudes);
        break;
      default:
        error = run_block<Element::fp32>(plan, block, x, g, sqnorms, magnitudes);
    }
    if (!error.empty()) return say(error, message, size);
  }
}
}
