// Convolution kernels against the definition, in double.
#include <algorithm>

#include "checks.h"
#include "core/conv_sample_norms.h"
#include "core/conv_weighted_grad.h"
#include "naive.h"

namespace checks {
namespace {

using adaclip::ConvShape;
using adaclip::NormMethod;

int64_t product(const int64_t v[3]) { return v[0] * v[1] * v[2]; }

ConvShape random_shape(Random& random, int kind) {
  ConvShape s{};
  s.batch = random.one_of<int64_t>({0, 1, 1, 2, 3, 9});
  s.groups = random.one_of<int64_t>({1, 1, 2, 3});
  s.in_channels = s.groups * random.between(1, 11);
  s.out_channels = s.groups * random.between(1, 37);
  for (int a = 0; a < 3; ++a) {
    const bool flat = a < random.between(0, 2);  // 1-D and 2-D have leading extents of 1
    s.kernel[a] = flat ? 1 : random.between(1, 3);
    s.stride[a] = flat ? 1 : random.between(1, 3);
    s.dilation[a] = flat ? 1 : random.between(1, 3);
    s.padding[a] = flat ? 0 : random.between(0, 2);
    s.out[a] = flat ? 1 : random.between(1, 5);
    // Exact, or with columns that no tap meets; less than the taps reach is padding behind the image.
    const int64_t reach = s.stride[a] * (s.out[a] - 1) + s.dilation[a] * (s.kernel[a] - 1) + 1;
    s.in[a] = std::max<int64_t>(1, reach - 2 * s.padding[a] + random.between(-1, 1));
  }
  if (kind == 1) {  // more positions than a piece holds, and than a ring of Gram rows keeps
    s.batch = 2, s.groups = 1, s.in_channels = 8, s.out_channels = 16;
    for (int a = 0; a < 2; ++a)
      s.in[a] = s.out[a] = s.kernel[a] = s.stride[a] = s.dilation[a] = 1, s.padding[a] = 0;
    s.in[2] = s.out[2] = random.between(500, 700), s.kernel[2] = 3,
    s.stride[2] = s.dilation[2] = s.padding[2] = 1;
  }
  if (kind == 2) {  // several samples to a piece, channels cut over threads
    s.batch = 70, s.groups = 1, s.in_channels = 40, s.out_channels = 33;
    for (int a = 0; a < 3; ++a)
      s.in[a] = s.out[a] = s.kernel[a] = s.stride[a] = s.dilation[a] = 1, s.padding[a] = 0;
    s.in[1] = s.in[2] = s.out[1] = s.out[2] = 2;
    s.kernel[1] = s.kernel[2] = 3, s.padding[1] = s.padding[2] = 1;
  }
  if (kind == 3) s.out[2] = 0;        // no output
  if (kind == 4) s.out_channels = 0;  // no weights
  return s;
}

struct Norms {
  Buffer<double> sqnorms, magnitudes;
  Buffer<float> kept, bias;
  Norms(const ConvShape& s, NormMethod method, const Buffer<float>& x, const Buffer<float>& g, int threads)
      : sqnorms(s.batch),
        magnitudes(s.batch),
        kept(s.batch * s.out_channels * (s.in_channels / s.groups) * product(s.kernel)),
        bias(s.batch * s.out_channels) {
    float* keep = method == NormMethod::instantiate ? kept.get() : nullptr;
    adaclip::conv_sample_norms(s, method, x.get(), g.get(),
                               {sqnorms.get(), magnitudes.get(), keep, bias.get()}, threads);
  }
};

void check_norms(const ConvShape& s, const Buffer<float>& x, const Buffer<float>& g, int threads) {
  const int64_t x_size = s.in_channels * product(s.in), plane = product(s.out),
                g_size = s.out_channels * plane;
  const int64_t taps = product(s.kernel), weights = s.out_channels * (s.in_channels / s.groups) * taps;
  const Norms gram(s, NormMethod::gram, x, g, threads), made(s, NormMethod::instantiate, x, g, threads);
  const double n = static_cast<double>(s.in_channels + s.out_channels + taps + plane + s.groups);
  for (int64_t b = 0; b < s.batch; ++b) {
    const auto exact = conv_gradient(s, x.get() + b * x_size, g.get() + b * g_size);
    CHECK_NEAR(gram.sqnorms[b], exact.sqnorm, 2 * n * 0x1p-53 * exact.magnitude + 1e-300);
    CHECK_NEAR(gram.magnitudes[b], exact.magnitude, 1e-5 * exact.magnitude);
    CHECK_NEAR(made.magnitudes[b], exact.magnitude, 1e-5 * exact.magnitude);
    double sqnorm = 0;
    for (int64_t i = 0; i < weights; ++i) {
      const float kept = made.kept[b * weights + i];
      sqnorm += double{kept} * kept;
      CHECK_NEAR(kept, exact.gradient[i], 258 * 0x1p-24 * exact.absolute[i] + 1e-30);
    }
    CHECK_NEAR(made.sqnorms[b], sqnorm, 1e-12 * sqnorm);
    for (int64_t c = 0; c < s.out_channels; ++c) {
      double sum = 0, absolute = 0;
      for (int64_t t = 0; t < plane; ++t) {
        sum += g[b * g_size + c * plane + t];
        absolute += std::fabs(g[b * g_size + c * plane + t]);
      }
      CHECK_NEAR(gram.bias[b * s.out_channels + c], sum, 1e-5 * absolute);
    }
  }
}

void check_weighted(const ConvShape& s, const Buffer<float>& x, const Buffer<float>& g,
                    const Buffer<float>& factors, const Buffer<float>& dw) {
  std::vector<double> sum(dw.size()), absolute(dw.size());
  for (int64_t b = 0; b < s.batch; ++b) {
    if (factors[b] == 0) continue;
    const auto exact = conv_gradient(s, x.get() + b * s.in_channels * product(s.in),
                                     g.get() + b * s.out_channels * product(s.out));
    for (int64_t i = 0; i < dw.size(); ++i) {
      sum[i] += double{factors[b]} * exact.gradient[i];
      absolute[i] += double{factors[b]} * exact.absolute[i];
    }
  }
  for (int64_t i = 0; i < dw.size(); ++i) CHECK_NEAR(dw[i], sum[i], 260 * 0x1p-24 * absolute[i] + 1e-30);
}

// One sample that is not finite: it says so, and no other sample's norm and no sum without it changes.
void check_poisoned(const ConvShape& s, Random& random, Buffer<float>& x, Buffer<float>& g,
                    Buffer<float>& factors, int threads) {
  const int64_t victim = random.between(0, s.batch - 1),
                weights = s.out_channels * (s.in_channels / s.groups) * product(s.kernel);
  factors[victim] = 0;
  Buffer<float> before(weights), after(weights);
  adaclip::conv_weighted_grad(s, x.get(), g.get(), factors.get(), before.get(), threads);
  const Norms clean(s, NormMethod::gram, x, g, threads),
      clean_made(s, NormMethod::instantiate, x, g, threads);
  const int64_t g_size = s.out_channels * product(s.out);
  g[victim * g_size + random.between(0, g_size - 1)] = random.bad();
  adaclip::conv_weighted_grad(s, x.get(), g.get(), factors.get(), after.get(), threads);
  CHECK(before.same_bits(after), "a sample with factor 0 entered");
  const Norms bad(s, NormMethod::gram, x, g, threads), bad_made(s, NormMethod::instantiate, x, g, threads);
  for (int64_t b = 0; b < s.batch; ++b) {
    if (b == victim) continue;
    CHECK(clean.sqnorms[b] == bad.sqnorms[b] && clean_made.sqnorms[b] == bad_made.sqnorms[b],
          "another sample");
  }
}

}  // namespace

int check_convolutions(uint64_t seed, int threads) {
  Random random(seed);
  constexpr int kCases = 24;
  for (int i = 0; i < kCases; ++i) {
    const ConvShape s = random_shape(random, i);
    Buffer<float> x = random.floats(s.batch * s.in_channels * product(s.in));
    Buffer<float> g = random.floats(s.batch * s.out_channels * product(s.out));
    Buffer<float> factors = random.floats(s.batch);
    for (int64_t b = 0; b < s.batch; ++b) factors[b] = random.uniform() < 0.3 ? 0.0f : std::fabs(factors[b]);
    check_norms(s, x, g, threads);
    const auto choice = adaclip::conv_method(s);
    CHECK(!choice.keep || choice.method == NormMethod::instantiate, "kept without being made");
    Buffer<float> dw(s.out_channels * (s.in_channels / s.groups) * product(s.kernel));
    if (product(s.out) > 0) {
      adaclip::conv_weighted_grad(s, x.get(), g.get(), factors.get(), dw.get(), threads);
      check_weighted(s, x, g, factors, dw);
      if (s.batch > 0 && g.size() > 0) check_poisoned(s, random, x, g, factors, threads);
    }
  }
  return kCases;
}

}  // namespace checks
