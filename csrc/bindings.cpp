// The only file that sees pybind11: pointers and sizes in, the GIL released while kernels run.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/bernoulli.h"
#include "core/chacha20.h"
#include "core/clip_and_sum.h"
#include "core/clip_factors.h"
#include "core/conv_sample_norms.h"
#include "core/conv_weighted_grad.h"
#include "core/group_norm.h"
#include "core/linear_sample_norms.h"
#include "core/noisy_step.h"
#include "core/normal.h"
#include "core/parallel.h"
#include "core/perturb.h"
#include "core/sample_statistics.h"
#include "core/simd.h"
#ifdef ADACLIP_WITH_CUDA
#include "cuda/conv_sample_norms.h"
#include "cuda/noisy_step.h"
#endif

namespace py = pybind11;

namespace {

adaclip::Keystream keystream(const std::string& key, uint64_t step, uint32_t stream) {
  if (key.size() != 32) throw std::invalid_argument("key must be 32 bytes");
  return adaclip::make_keystream(reinterpret_cast<const uint8_t*>(key.data()), step, stream);
}

// The array owns the vector: no copy of what may be millions of indices.
py::array_t<int64_t> as_array(std::vector<int64_t>&& values) {
  auto* owned = new std::vector<int64_t>(std::move(values));
  py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<int64_t>*>(p); });
  return py::array_t<int64_t>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

using Triple = std::array<int64_t, 3>;

adaclip::ConvShape conv_shape(int64_t batch, int64_t in_channels, int64_t out_channels, const Triple& in,
                              const Triple& out, const Triple& kernel, const Triple& stride,
                              const Triple& padding, const Triple& dilation, int64_t groups) {
  adaclip::ConvShape s{batch, in_channels, out_channels, {}, {}, {}, {}, {}, {}, groups};
  for (int a = 0; a < 3; ++a) {
    s.in[a] = in[a], s.out[a] = out[a], s.kernel[a] = kernel[a];
    s.stride[a] = stride[a], s.padding[a] = padding[a], s.dilation[a] = dilation[a];
  }
  return s;
}

adaclip::NormMethod norm_method(const std::string& name) {
  if (name == "gram") return adaclip::NormMethod::gram;
  if (name == "instantiate") return adaclip::NormMethod::instantiate;
  throw std::invalid_argument("method must be gram or instantiate, got " + name);
}

adaclip::ClipKind clip_kind(const std::string& name) {
  if (name == "threshold") return adaclip::ClipKind::threshold;
  if (name == "normalized") return adaclip::ClipKind::normalized;
  if (name == "psac") return adaclip::ClipKind::psac;
  throw std::invalid_argument("kind must be threshold, normalized or psac, got " + name);
}

std::pair<std::string, bool> named(const adaclip::MethodChoice& choice) {
  return {choice.method == adaclip::NormMethod::gram ? "gram" : "instantiate", choice.keep};
}

adaclip::NormOutputs norm_outputs(adaclip::NormMethod method, uintptr_t sqnorms, uintptr_t magnitudes,
                                  uintptr_t kept, uintptr_t bias) {
  if (kept != 0 && method != adaclip::NormMethod::instantiate)
    throw std::invalid_argument("kept needs method instantiate");
  return {reinterpret_cast<double*>(sqnorms), reinterpret_cast<double*>(magnitudes),
          reinterpret_cast<float*>(kept), reinterpret_cast<float*>(bias)};
}

#ifdef ADACLIP_WITH_CUDA
void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

adaclip::cuda::Element element(const std::string& dtype) {
  if (dtype == "bfloat16") return adaclip::cuda::Element::bf16;
  if (dtype == "float16") return adaclip::cuda::Element::fp16;
  if (dtype == "float32") return adaclip::cuda::Element::fp32;
  throw std::invalid_argument("dtype must be bfloat16, float16 or float32, got " + dtype);
}

// Addresses are of device memory, `stream` is a cudaStream_t. Launches only: nothing waits for the device.
void bind_cuda(py::module_ m) {
  m.doc() = "The CUDA kernels. What an argument is: csrc/cuda/*.h.";
  m.def("device_refusal", &adaclip::cuda::device_refusal);
  m.def("conv_sample_norms_refusal", [](int64_t batch, int64_t in_channels, int64_t out_channels, Triple in,
                                        Triple out, Triple kernel, Triple stride, Triple padding,
                                        Triple dilation, int64_t groups, int device) {
    return adaclip::cuda::conv_sample_norms_refusal(
        conv_shape(batch, in_channels, out_channels, in, out, kernel, stride, padding, dilation, groups),
        device);
  });
  m.def("conv_sample_norms", [](uintptr_t x, uintptr_t g, int64_t batch, int64_t in_channels,
                                int64_t out_channels, Triple in, Triple out, Triple kernel, Triple stride,
                                Triple padding, Triple dilation, int64_t groups, const std::string& dtype,
                                Triple x_strides, Triple g_strides, uintptr_t sqnorms, uintptr_t magnitudes,
                                int device, uintptr_t stream) {
    const auto shape =
        conv_shape(batch, in_channels, out_channels, in, out, kernel, stride, padding, dilation, groups);
    const auto type = element(dtype);
    py::gil_scoped_release unlocked;
    check(adaclip::cuda::conv_sample_norms(
        shape, type, reinterpret_cast<const void*>(x), {x_strides[0], x_strides[1], x_strides[2]},
        reinterpret_cast<const void*>(g), {g_strides[0], g_strides[1], g_strides[2]},
        reinterpret_cast<double*>(sqnorms), reinterpret_cast<double*>(magnitudes), device,
        reinterpret_cast<cudaStream_t>(stream)));
  });
  m.def("noisy_step", [](uintptr_t key, uintptr_t step, uint32_t stream_of_noise, uintptr_t pointers,
                         uintptr_t numel, uintptr_t first_chunk, uintptr_t rules, uintptr_t tiles,
                         int64_t tile_count, int device, uintptr_t stream) {
    const adaclip::cuda::NoiseAddress noise{reinterpret_cast<const uint32_t*>(key),
                                            reinterpret_cast<const uint64_t*>(step), stream_of_noise};
    const adaclip::cuda::StepTable table{
        reinterpret_cast<const int64_t*>(pointers),    reinterpret_cast<const int64_t*>(numel),
        reinterpret_cast<const int64_t*>(first_chunk), reinterpret_cast<const adaclip::StepRule*>(rules),
        reinterpret_cast<const int32_t*>(tiles),       tile_count};
    py::gil_scoped_release unlocked;
    // This runtime is linked statically: its current device is not that of torch's.
    check(cudaSetDevice(device));
    check(adaclip::cuda::noisy_step(noise, table, reinterpret_cast<cudaStream_t>(stream)));
  });
}
#endif

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "adaclip's C++ core. Addresses are integers; adaclip.ops checks shapes and dtypes.";

  m.def("simd_level", [] { return std::string(adaclip::simd_name(adaclip::simd_level())); });
  m.def("simd_supported", [] { return std::string(adaclip::simd_name(adaclip::simd_supported())); });
  m.def("set_simd_level", [](const std::string& name) {
    for (auto level : {adaclip::Simd::portable, adaclip::Simd::avx2, adaclip::Simd::avx512})
      if (name == adaclip::simd_name(level)) {
        if (!adaclip::set_simd_level(level)) throw std::invalid_argument("this CPU cannot run " + name);
        return;
      }
    throw std::invalid_argument("level must be portable, avx2 or avx512, got " + name);
  });
  m.attr("CHUNK_NORMALS") = adaclip::kChunkNormals;
  m.attr("STREAM_CHUNKS") = adaclip::kStreamChunks;
  m.def("chacha20_block", [](const std::string& key, uint32_t counter, uint64_t step, uint32_t stream) {
    std::vector<uint32_t> words(adaclip::kBlockWords);
    adaclip::chacha20_block(keystream(key, step, stream), counter, words.data());
    return words;
  });
  m.def("chacha20_chunk", [](const std::string& key, int64_t chunk, uint64_t step, uint32_t stream) {
    std::vector<uint32_t> words(adaclip::kChunkWords);
    adaclip::chacha20_chunks(keystream(key, step, stream), chunk, 1, words.data());
    return words;
  });
  m.def("bernoulli",
        [](const std::string& key, uint64_t step, uint32_t stream, int64_t n, double q, int threads) {
          const auto ks = keystream(key, step, stream);
          std::vector<int64_t> taken;
          {
            py::gil_scoped_release unlocked;
            taken = adaclip::bernoulli(ks, n, q, threads);
          }
          return as_array(std::move(taken));
        });
  m.def("normals_of_words", [](const std::vector<uint32_t>& words) {
    if (words.size() != adaclip::kChunkWords) throw std::invalid_argument("words must be 256");
    std::vector<float> z(adaclip::kChunkNormals);
    adaclip::normals_of_words(words.data(), z.data());
    return z;
  });
  m.def("normal_fill", [](const std::string& key, uint64_t step, uint32_t stream, int64_t first_chunk,
                          uintptr_t out, int64_t n, float std, bool add, int threads) {
    const auto ks = keystream(key, step, stream);
    py::gil_scoped_release unlocked;
    adaclip::normal_fill(ks, first_chunk, reinterpret_cast<float*>(out), n, std, add, threads);
  });
  // One tuple per tensor: addresses of parameter, gradient, momentum and square (0: none), number of
  // elements, first chunk, and the numbers of StepRule in its order.
  using Step =
      std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, std::array<float, 14>>;
  m.def("noisy_step", [](const std::string& key, uint64_t step, uint32_t stream,
                         const std::vector<Step>& steps, int threads) {
    std::vector<adaclip::StepTensor> tensors;
    tensors.reserve(steps.size());
    for (const auto& [param, grad, momentum, square, n, first_chunk, r] : steps)
      tensors.push_back(
          {reinterpret_cast<float*>(param),
           reinterpret_cast<const float*>(grad),
           reinterpret_cast<float*>(momentum),
           reinterpret_cast<float*>(square),
           n,
           first_chunk,
           {r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8], r[9], r[10], r[11], r[12], r[13]}});
    const auto ks = keystream(key, step, stream);
    py::gil_scoped_release unlocked;
    adaclip::noisy_step(ks, tensors.data(), static_cast<int64_t>(tensors.size()), threads);
  });
  // One tuple per tensor: addresses of parameter, output, shift and direction (0: none), number of
  // elements, first chunk, standard deviation of the shift, and length along the direction.
  using Moved = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, float, float>;
  m.def("perturb", [](const std::string& key, uint64_t step, uint32_t stream, const std::vector<Moved>& moved,
                      bool draw, float sign, int threads) {
    std::vector<adaclip::PerturbTensor> tensors;
    tensors.reserve(moved.size());
    for (const auto& [param, out, shift, direction, n, first_chunk, std, length] : moved)
      tensors.push_back({reinterpret_cast<const float*>(param), reinterpret_cast<float*>(out),
                         reinterpret_cast<float*>(shift), reinterpret_cast<const float*>(direction), n,
                         first_chunk, std, length});
    const auto ks = keystream(key, step, stream);
    py::gil_scoped_release unlocked;
    adaclip::perturb(ks, tensors.data(), static_cast<int64_t>(tensors.size()), draw, sign, threads);
  });
  m.def("row_sqnorms",
        [](uintptr_t x, int64_t rows, int64_t width, uintptr_t out, bool accumulate, int threads) {
          py::gil_scoped_release unlocked;
          adaclip::row_sqnorms(reinterpret_cast<const float*>(x), rows, width, reinterpret_cast<double*>(out),
                               accumulate, threads);
        });
  m.def("weighted_sum", [](uintptr_t x, uintptr_t factors, int64_t rows, int64_t width, uintptr_t out,
                           bool accumulate, int threads) {
    py::gil_scoped_release unlocked;
    adaclip::weighted_sum(reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(factors), rows,
                          width, reinterpret_cast<float*>(out), accumulate, adaclip::SumNoise{}, 1.0f,
                          threads);
  });
  m.def("noisy_sum", [](const std::string& key, uint64_t step, uint32_t stream, uintptr_t x,
                        uintptr_t factors, int64_t rows, int64_t width, uintptr_t out, int64_t first_chunk,
                        float std, float denominator, int threads) {
    const adaclip::SumNoise noise{keystream(key, step, stream), first_chunk, std};
    py::gil_scoped_release unlocked;
    adaclip::weighted_sum(reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(factors), rows,
                          width, reinterpret_cast<float*>(out), false, noise, denominator, threads);
  });
  m.def("clip_factors", [](uintptr_t sqnorms, uintptr_t thresholds, uintptr_t weights, int64_t groups,
                           int64_t rows, int64_t real, const std::string& kind, double stability,
                           double slack, double unit, double denominator, uintptr_t factors, uintptr_t norms,
                           uintptr_t shares) {
    const adaclip::ClipRule rule{clip_kind(kind), stability, slack, unit, denominator};
    py::gil_scoped_release unlocked;
    adaclip::clip_factors(
        reinterpret_cast<const double*>(sqnorms), reinterpret_cast<const double*>(thresholds),
        reinterpret_cast<const double*>(weights), groups, rows, real, rule, reinterpret_cast<float*>(factors),
        reinterpret_cast<double*>(norms), reinterpret_cast<double*>(shares));
  });
  m.def("sample_statistics", [](uintptr_t sqnorms, uintptr_t thresholds, int64_t groups, int64_t rows,
                                int64_t real, double unit, uintptr_t below, uintptr_t histogram,
                                uintptr_t edges, int64_t bins, uintptr_t group_sums, uintptr_t group_counts,
                                uintptr_t labels, uintptr_t table, uintptr_t shares) {
    const adaclip::SampleCounts counts{
        reinterpret_cast<double*>(below),         reinterpret_cast<double*>(histogram),
        reinterpret_cast<const double*>(edges),   bins,
        reinterpret_cast<double*>(group_sums),    reinterpret_cast<double*>(group_counts),
        reinterpret_cast<const int64_t*>(labels), reinterpret_cast<const int64_t*>(table),
        reinterpret_cast<const double*>(shares)};
    py::gil_scoped_release unlocked;
    adaclip::sample_statistics(reinterpret_cast<const double*>(sqnorms),
                               reinterpret_cast<const double*>(thresholds), groups, rows, real, unit, counts);
  });
  m.def("follow_quantile", [](uintptr_t thresholds, uintptr_t run, uintptr_t noisy_below, uintptr_t low,
                              uintptr_t high, int64_t groups, double denominator, double quantile,
                              double rate, bool accelerate) {
    adaclip::follow_quantile(reinterpret_cast<double*>(thresholds), reinterpret_cast<double*>(run),
                             reinterpret_cast<const double*>(noisy_below),
                             reinterpret_cast<const double*>(low), reinterpret_cast<const double*>(high),
                             groups, {denominator, quantile, rate, accelerate});
  });
  m.def("threading_backend", [] { return std::string(adaclip::threading_backend()); });

  m.def("conv_method", [](int64_t batch, int64_t in_channels, int64_t out_channels, Triple in, Triple out,
                          Triple kernel, Triple stride, Triple padding, Triple dilation, int64_t groups) {
    return named(adaclip::conv_method(
        conv_shape(batch, in_channels, out_channels, in, out, kernel, stride, padding, dilation, groups)));
  });
  m.def("conv_sample_norms", [](uintptr_t x, uintptr_t g, int64_t batch, int64_t in_channels,
                                int64_t out_channels, Triple in, Triple out, Triple kernel, Triple stride,
                                Triple padding, Triple dilation, int64_t groups, const std::string& method,
                                uintptr_t sqnorms, uintptr_t magnitudes, uintptr_t kept, uintptr_t bias,
                                int threads) {
    const auto shape =
        conv_shape(batch, in_channels, out_channels, in, out, kernel, stride, padding, dilation, groups);
    const auto way = norm_method(method);
    const auto outputs = norm_outputs(way, sqnorms, magnitudes, kept, bias);
    py::gil_scoped_release unlocked;
    adaclip::conv_sample_norms(shape, way, reinterpret_cast<const float*>(x),
                               reinterpret_cast<const float*>(g), outputs, threads);
  });
  m.def("conv_weighted_grad_suits",
        [](int64_t batch, int64_t in_channels, int64_t out_channels, Triple in, Triple out, Triple kernel,
           Triple stride, Triple padding, Triple dilation, int64_t groups) {
          return adaclip::conv_weighted_grad_suits(conv_shape(batch, in_channels, out_channels, in, out,
                                                              kernel, stride, padding, dilation, groups));
        });
  m.def("conv_weighted_grad", [](uintptr_t x, uintptr_t g, uintptr_t factors, int64_t batch,
                                 int64_t in_channels, int64_t out_channels, Triple in, Triple out,
                                 Triple kernel, Triple stride, Triple padding, Triple dilation,
                                 int64_t groups, uintptr_t dw, int threads) {
    const auto shape =
        conv_shape(batch, in_channels, out_channels, in, out, kernel, stride, padding, dilation, groups);
    py::gil_scoped_release unlocked;
    adaclip::conv_weighted_grad(shape, reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(g),
                                reinterpret_cast<const float*>(factors), reinterpret_cast<float*>(dw),
                                threads);
  });
  m.def("linear_method", [](int64_t batch, int64_t positions, int64_t in, int64_t out) {
    return named(adaclip::linear_method(batch, positions, in, out));
  });
  m.def("linear_sample_norms", [](uintptr_t a, uintptr_t g, int64_t batch, int64_t positions, int64_t in,
                                  int64_t out, const std::string& method, uintptr_t sqnorms,
                                  uintptr_t magnitudes, uintptr_t kept, uintptr_t bias, int threads) {
    const auto way = norm_method(method);
    const auto outputs = norm_outputs(way, sqnorms, magnitudes, kept, bias);
    py::gil_scoped_release unlocked;
    adaclip::linear_sample_norms(batch, positions, in, out, way, reinterpret_cast<const float*>(a),
                                 reinterpret_cast<const float*>(g), outputs, threads);
  });

  m.def("group_norm_backward", [](uintptr_t g, uintptr_t x, uintptr_t mean, uintptr_t rstd, uintptr_t weight,
                                  int64_t batch, int64_t channels, int64_t plane, int64_t groups,
                                  uintptr_t dx, uintptr_t dgamma, uintptr_t dbeta, int threads) {
    py::gil_scoped_release unlocked;
    adaclip::group_norm_backward({batch, channels, plane, groups}, reinterpret_cast<const float*>(g),
                                 reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(mean),
                                 reinterpret_cast<const float*>(rstd), reinterpret_cast<const float*>(weight),
                                 reinterpret_cast<float*>(dx), reinterpret_cast<float*>(dgamma),
                                 reinterpret_cast<float*>(dbeta), threads);
  });

  m.attr("CUDA_NOTE") = ADACLIP_CUDA_NOTE;  // what the kernels are compiled for, or why they are not
#ifdef ADACLIP_WITH_CUDA
  m.attr("CUDA_BUILT") = true;
  bind_cuda(m.def_submodule("cuda"));
#else
  m.attr("CUDA_BUILT") = false;
#endif
}
