// Linear layers and group normalization against the definition, in double.
#include "checks.h"
#include "core/group_norm.h"
#include "core/linear_sample_norms.h"
#include "naive.h"

namespace checks {

using adaclip::NormMethod;

int check_linears(uint64_t seed, int threads) {
  Random random(seed);
  constexpr int kCases = 40;
  for (int i = 0; i < kCases; ++i) {
    const int64_t batch = random.one_of<int64_t>({0, 1, 2, 5, 17}),
                  positions = random.one_of<int64_t>({0, 1, 1, 2, 9, 40});
    const int64_t in = random.between(i % 10 == 0 ? 0 : 1, 40), out = random.between(i % 11 == 0 ? 0 : 1, 70);
    const Buffer<float> a = random.floats(batch * positions * in), g = random.floats(batch * positions * out);
    for (NormMethod method : {NormMethod::gram, NormMethod::instantiate}) {
      Buffer<double> sqnorms(batch), magnitudes(batch);
      Buffer<float> kept(batch * out * in), bias(batch * out);
      float* keep = method == NormMethod::instantiate ? kept.get() : nullptr;
      adaclip::linear_sample_norms(batch, positions, in, out, method, a.get(), g.get(),
                                   {sqnorms.get(), magnitudes.get(), keep, bias.get()}, threads);
      for (int64_t b = 0; b < batch; ++b) {
        const auto exact =
            linear_gradient(positions, in, out, a.get() + b * positions * in, g.get() + b * positions * out);
        CHECK_NEAR(magnitudes[b], exact.magnitude, 1e-5 * exact.magnitude);
        const double slack = method == NormMethod::gram ? 1e-12 * exact.magnitude : 4e-5 * exact.magnitude;
        CHECK_NEAR(sqnorms[b], exact.sqnorm, slack);
        if (keep != nullptr)
          for (int64_t e = 0; e < out * in; ++e)
            CHECK_NEAR(kept[b * out * in + e], exact.gradient[e], 258 * 0x1p-24 * exact.absolute[e] + 1e-30);
        for (int64_t o = 0; o < out; ++o) {
          double sum = 0;
          for (int64_t t = 0; t < positions; ++t) sum += g[(b * positions + t) * out + o];
          CHECK_NEAR(bias[b * out + o], sum, 1e-5 * static_cast<double>(positions));
        }
      }
    }
    const auto choice = adaclip::linear_method(batch, positions, in, out);
    CHECK(!choice.keep || choice.method == NormMethod::instantiate, "kept without being made");
  }
  return kCases;
}

int check_group_norms(uint64_t seed, int threads) {
  Random random(seed);
  constexpr int kCases = 40;
  for (int i = 0; i < kCases; ++i) {
    const int64_t batch = random.one_of<int64_t>({0, 1, 2, 7}), groups = random.between(1, 5);
    const int64_t per_group = random.between(1, 6), channels = groups * per_group;
    // 2048 positions are summed in float before they go to double.
    const int64_t plane = i == 0 ? 2100 : random.one_of<int64_t>({1, 2, 3, 16, 33, 64});
    Buffer<float> g = random.floats(batch * channels * plane);
    const Buffer<float> x = random.floats(batch * channels * plane), weight = random.floats(channels);
    const bool affine = random.uniform() < 0.7, inputs = random.uniform() < 0.8;
    Buffer<float> mean(batch * groups), rstd(batch * groups);
    for (int64_t n = 0; n < batch * groups; ++n) {
      double sum = 0, squares = 0;
      const double count = static_cast<double>(per_group * plane);
      for (int64_t k = 0; k < per_group * plane; ++k) sum += x[n * per_group * plane + k];
      for (int64_t k = 0; k < per_group * plane; ++k)
        squares += std::pow(x[n * per_group * plane + k] - sum / count, 2);
      mean[n] = static_cast<float>(sum / count),
      rstd[n] = static_cast<float>(1 / std::sqrt(squares / count + 1e-5));
    }
    Buffer<float> dx(batch * channels * plane), dgamma(batch * channels), dbeta(batch * channels);
    const auto run = [&](Buffer<float>& dx_, Buffer<float>& dgamma_, Buffer<float>& dbeta_) {
      adaclip::group_norm_backward({batch, channels, plane, groups}, g.get(), x.get(), mean.get(), rstd.get(),
                                   affine ? weight.get() : nullptr, inputs ? dx_.get() : nullptr,
                                   dgamma_.get(), dbeta_.get(), threads);
    };
    run(dx, dgamma, dbeta);
    for (int64_t n = 0; n < batch * groups; ++n) {
      double with_x = 0, without = 0;
      for (int64_t c = 0; c < per_group; ++c) {
        const int64_t channel = n * per_group + c;
        const double w = affine ? weight[channel % channels] : 1.0;
        double product = 0, plain = 0, absolute = 0;
        for (int64_t t = 0; t < plane; ++t) {
          const double value = g[channel * plane + t],
                       hat = (x[channel * plane + t] - double{mean[n]}) * rstd[n];
          product += value * hat, plain += value, absolute += std::fabs(value) * (1 + std::fabs(hat));
        }
        CHECK_NEAR(dgamma[channel], product, 2e-5 * absolute);
        CHECK_NEAR(dbeta[channel], plain, 2e-5 * absolute);
        with_x += w * product, without += w * plain;
      }
      const double count = static_cast<double>(per_group * plane);
      for (int64_t k = 0; inputs && k < per_group * plane; ++k) {
        const int64_t at = n * per_group * plane + k;
        const double w = affine ? weight[at / plane % channels] : 1.0;
        const double hat = (x[at] - double{mean[n]}) * rstd[n];
        CHECK_NEAR(dx[at], rstd[n] * (w * g[at] - without / count - hat * with_x / count),
                   1e-4 * (1 + rstd[n]) * (1 + std::fabs(hat)));
      }
    }
    if (batch < 2) continue;
    // What is not finite stays in its own sample and group.
    Buffer<float> dx2(dx.size()), dgamma2(dgamma.size()), dbeta2(dbeta.size());
    g[0] = random.bad();
    run(dx2, dgamma2, dbeta2);
    for (int64_t c = per_group; c < batch * channels; ++c)
      CHECK(dgamma[c] == dgamma2[c] && dbeta[c] == dbeta2[c], "another sample");
    for (int64_t k = per_group * plane; inputs && k < dx.size(); ++k)
      CHECK(dx[k] == dx2[k], "another sample");
  }
  return kCases;
}

}  // namespace checks
