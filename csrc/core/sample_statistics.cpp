#include "core/sample_statistics.h"

#include <algorithm>
#include <cmath>

namespace adaclip {

void sample_statistics(const double* sqnorms, const double* thresholds, int64_t groups, int64_t rows,
                       int64_t real, double unit, const SampleCounts& counts) {
  for (int64_t b = 0; b < std::min(rows, real); ++b) {
    double total = 0.0;
    bool live = true;
    for (int64_t k = 0; k < groups; ++k) {
      total += sqnorms[k * rows + b];
      live = live && sqnorms[k * rows + b] >= 0.0 && std::isfinite(sqnorms[k * rows + b]);
    }
    if (!live) continue;
    if (counts.below != nullptr)
      for (int64_t k = 0; k < groups; ++k)
        counts.below[k] += unit * std::sqrt(sqnorms[k * rows + b]) <= thresholds[k] ? 0.5 : -0.5;
    if (counts.histogram != nullptr) {
      const double* end = counts.edges + counts.bins - 1;
      counts.histogram[std::lower_bound(counts.edges, end, unit * std::sqrt(total)) - counts.edges] += 1.0;
    }
    if (counts.labels == nullptr) continue;
    const int64_t group = counts.table[counts.labels[b]];
    if (counts.group_sums != nullptr) counts.group_sums[group] += counts.shares[b];
    if (counts.group_counts != nullptr) counts.group_counts[group] += 1.0;
  }
}

void follow_quantile(double* thresholds, double* run, const double* noisy_below, const double* low,
                     const double* high, int64_t groups, const QuantileRule& rule) {
  for (int64_t k = 0; k < groups; ++k) {
    const double gap = 0.5 + noisy_below[k] / rule.denominator - rule.quantile;
    double speed = 1.0;
    if (rule.accelerate) {
      const double side = gap > 0.75 * (1.0 - rule.quantile) ? 1.0 : gap < -0.75 * rule.quantile ? -1.0 : 0.0;
      run[k] = side == 0.0 ? 0.0 : side * run[k] > 0.0 ? run[k] + side : side;
      speed = std::exp2(std::min(std::max(std::fabs(run[k]) - 2.0, 0.0), 3.0));
    }
    const double next = thresholds[k] * std::exp(-rule.rate * speed * gap);
    thresholds[k] = std::min(std::max(next, low[k]), high[k]);
  }
}

}  // namespace adaclip
