// Rows that exist in memory, clipping factors and what is counted about samples.
#include <algorithm>

#include "checks.h"
#include "core/clip_and_sum.h"
#include "core/clip_factors.h"
#include "core/sample_statistics.h"

namespace checks {

int check_rows(uint64_t seed, int threads) {
  Random random(seed);
  constexpr int kCases = 40;
  const uint8_t key[32] = {1, 2, 3};
  for (int i = 0; i < kCases; ++i) {
    // More than a segment, more than a run of sums, ragged ends, and nothing.
    const int64_t width = random.one_of<int64_t>({0, 1, 15, 16, 17, 160, 161, 1919, 1921, 5000, 40000});
    const int64_t rows = random.one_of<int64_t>({0, 1, 2, 7, 8, 9, 17});
    Buffer<float> x = random.floats(rows * width);
    Buffer<float> factors = random.floats(rows);
    for (int64_t b = 0; b < rows; ++b)
      if (random.uniform() < 0.3) {
        factors[b] = 0;  // such a row is not read
        if (width > 0) x[b * width + random.between(0, width - 1)] = random.bad();
      }
    const bool accumulate = random.uniform() < 0.5;
    Buffer<double> sqnorms(rows, accumulate ? 3.0 : std::numeric_limits<double>::quiet_NaN());
    adaclip::row_sqnorms(x.get(), rows, width, sqnorms.get(), accumulate, threads);
    for (int64_t b = 0; b < rows; ++b) {
      double sum = accumulate ? 3.0 : 0.0;
      for (int64_t d = 0; d < width; ++d) sum += double{x[b * width + d]} * x[b * width + d];
      CHECK(std::isfinite(sum) == std::isfinite(sqnorms[b]), "row %lld", static_cast<long long>(b));
      if (std::isfinite(sum)) CHECK_NEAR(sqnorms[b], sum, 1e-12 * sum);
    }

    const float std = random.uniform() < 0.5 ? 0.0f : 0.7f, denominator = 3.0f;
    const adaclip::SumNoise noise{adaclip::make_keystream(key, seed, 5), 11, std};
    Buffer<float> z(width), out(width, accumulate ? 2.0f : std::numeric_limits<float>::quiet_NaN());
    adaclip::normal_fill(noise.keystream, noise.first_chunk, z.get(), width, 1.0f, false, 1);
    adaclip::weighted_sum(x.get(), factors.get(), rows, width, out.get(), accumulate, noise, denominator,
                          threads);
    for (int64_t d = 0; d < width; ++d) {
      double sum = (accumulate ? 2.0 : 0.0) + double{std} * z[d], absolute = std::fabs(sum) + 1;
      for (int64_t b = 0; b < rows; ++b)
        if (factors[b] != 0) {
          sum += double{factors[b]} * x[b * width + d];
          absolute += std::fabs(double{factors[b]} * x[b * width + d]);
        }
      CHECK_NEAR(out[d], sum / denominator, 2e-6 * absolute);
    }
  }
  return kCases;
}

int check_clipping(uint64_t seed, int) {
  Random random(seed);
  constexpr int kCases = 60;
  for (int i = 0; i < kCases; ++i) {
    const int64_t groups = random.one_of<int64_t>({1, 1, 2, 5}), rows = random.one_of<int64_t>({0, 1, 2, 33});
    const int64_t real = random.between(0, rows);
    Buffer<double> sqnorms(groups * rows), thresholds(groups), weights(rows);
    for (int64_t k = 0; k < groups * rows; ++k)
      sqnorms[k] = random.uniform() < 0.15 ? (random.uniform() < 0.2 ? -1.0 : double{random.bad()})
                                           : std::pow(4 * random.uniform(), 2);
    for (int64_t k = 0; k < groups; ++k) thresholds[k] = 0.1 + random.uniform();
    for (int64_t b = 0; b < rows; ++b) weights[b] = random.one_of({0.0, 0.3, 1.0, 7.0, -1.0, std::nan("")});
    const bool weighted = random.uniform() < 0.5;
    const auto kind =
        random.one_of({adaclip::ClipKind::threshold, adaclip::ClipKind::normalized, adaclip::ClipKind::psac});
    const adaclip::ClipRule rule{kind, 0.01, 1 - 1e-6, 2.0, 5.0};
    Buffer<float> factors(groups * rows);
    Buffer<double> norms(rows), shares(rows);
    adaclip::clip_factors(sqnorms.get(), thresholds.get(), weighted ? weights.get() : nullptr, groups, rows,
                          real, rule, factors.get(), norms.get(), shares.get());
    for (int64_t b = 0; b < rows; ++b) {
      bool live = b < real;
      for (int64_t k = 0; k < groups; ++k)
        live = live && std::isfinite(sqnorms[k * rows + b]) && sqnorms[k * rows + b] >= 0;
      CHECK(live ? shares[b] >= 0 && shares[b] <= 1 : std::isnan(shares[b]), "share %g", shares[b]);
      for (int64_t k = 0; k < groups; ++k) {
        const float factor = factors[k * rows + b];
        if (!live) {
          CHECK(factor == 0.0f, "factor %g", factor);
          continue;
        }
        // The guarantee: what enters the sum is no longer than the threshold. n = 2 sqrt(sqnorm), of c n / 5.
        CHECK(factor * 5.0 * std::sqrt(sqnorms[k * rows + b]) <= thresholds[k], "factor %g", factor);
        const bool none = weighted && !(weights[b] > 0);
        CHECK(none ? factor == 0.0f : factor > 0.0f, "factor %g", factor);
      }
    }

    // Statistics: every output may be left out.
    constexpr int64_t kBins = 7, kLabels = 4, kGroups = 3;
    Buffer<double> edges(kBins - 1), below(groups, 0.0), histogram(kBins, 0.0), sums(kGroups, 0.0),
        counts(kGroups, 0.0);
    for (int64_t e = 0; e < kBins - 1; ++e) edges[e] = 1.0 + static_cast<double>(e);
    Buffer<int64_t> labels(rows, 0), table(kLabels, 0);
    for (int64_t b = 0; b < rows; ++b) labels[b] = random.between(0, kLabels - 1);
    for (int64_t c = 0; c < kLabels; ++c) table[c] = c % kGroups;
    const bool has_below = i % 2 == 0, has_histogram = i % 3 != 0, has_labels = i % 5 != 0;
    adaclip::sample_statistics(
        sqnorms.get(), thresholds.get(), groups, rows, real, 2.0,
        {has_below ? below.get() : nullptr, has_histogram ? histogram.get() : nullptr,
         has_histogram ? edges.get() : nullptr, kBins, has_labels ? sums.get() : nullptr,
         has_labels ? counts.get() : nullptr, has_labels ? labels.get() : nullptr,
         has_labels ? table.get() : nullptr, has_labels ? shares.get() : nullptr});
    double live = 0, filled = 0, counted = 0;
    for (int64_t b = 0; b < real; ++b) live += !std::isnan(shares[b]);
    for (int64_t e = 0; e < kBins; ++e) filled += histogram[e];
    for (int64_t c = 0; c < kGroups; ++c) counted += counts[c];
    CHECK(filled == (has_histogram ? live : 0) && counted == (has_labels ? live : 0), "%g live, %g, %g", live,
          filled, counted);
    for (int64_t k = 0; k < groups; ++k) CHECK(std::fabs(below[k]) <= live / 2, "below %g", below[k]);

    // A threshold stays within its bounds whatever is measured.
    Buffer<double> run(groups, 0.0), measured(groups), low(groups, 0.05), high(groups, 2.0);
    for (int64_t k = 0; k < groups; ++k) measured[k] = 1e3 * (random.uniform() - 0.5);
    adaclip::follow_quantile(thresholds.get(), run.get(), measured.get(), low.get(), high.get(), groups,
                             {4.0, 0.5, 0.2, i % 2 == 0});
    for (int64_t k = 0; k < groups; ++k)
      CHECK(thresholds[k] >= 0.05 && thresholds[k] <= 2.0, "%g", thresholds[k]);
  }
  return kCases;
}

}  // namespace checks
