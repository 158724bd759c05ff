// What is counted about the samples of a batch beside their gradients, and how a threshold follows a count.
#pragma once

#include <cstdint>

namespace adaclip {

// Sums over samples; each is left out where its pointer is null.
struct SampleCounts {
  double* below;        // [K]: 1[n_k <= C_k] - 1/2
  double* histogram;    // [bins]: one at the first bin whose upper edge is not below the whole norm
  const double* edges;  // [bins - 1], ascending; the last bin is open
  int64_t bins;
  double* group_sums;     // [G]: the share
  double* group_counts;   // [G]: 1
  const int64_t* labels;  // [B]
  const int64_t* table;   // [classes]: the group of each label, below G
  const double* shares;   // [B], for group_sums
};

// Adds what rows below `real` contribute, in the order of the rows, to the sums. n_k = unit sqrt(sqnorm_k)
// from sqnorms [K, B]; a row with a norm that is not finite contributes nothing to any of them.
void sample_statistics(const double* sqnorms, const double* thresholds, int64_t groups, int64_t rows,
                       int64_t real, double unit, const SampleCounts& counts);

struct QuantileRule {
  double denominator, quantile, rate;
  bool accelerate;
};

// With b = 1/2 + noisy_below / denominator: C *= exp(-rate f (b - quantile)), kept in [low, high]. Each of
// the K entries by itself.
//
// run [K]: how many steps in a row were saturated (b - quantile beyond 3/4 of what it can be), negative
// downwards. accelerate: f = min(2^max(0, |run| - 2), 8); otherwise f = 1 and run is not touched.
void follow_quantile(double* thresholds, double* run, const double* noisy_below, const double* low,
                     const double* high, int64_t groups, const QuantileRule& rule);

}  // namespace adaclip
