#include "core/clip_factors.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace adaclip {

namespace {

// The factor at weight 1. Written so that n = 0 gives 1 for a threshold and a finite number for the others.
double full_factor(const ClipRule& rule, double limit, double n) {
  if (rule.kind == ClipKind::threshold) return limit < n ? limit / n : 1.0;
  const double s = rule.stability;
  return limit / (n + (rule.kind == ClipKind::normalized ? s : s / (n + s)));
}

}  // namespace

void clip_factors(const double* sqnorms, const double* thresholds, const double* weights, int64_t groups,
                  int64_t rows, int64_t real, const ClipRule& rule, float* factors, double* norms,
                  double* shares) {
  constexpr float kLeast = 0x1p-100f;
  double bound = 0.0;
  for (int64_t k = 0; k < groups; ++k) bound += thresholds[k] * thresholds[k];
  for (int64_t b = 0; b < rows; ++b) {
    double total = 0.0;
    bool live = b < real;
    for (int64_t k = 0; k < groups; ++k) {
      total += sqnorms[k * rows + b];
      live = live && sqnorms[k * rows + b] >= 0.0 && std::isfinite(sqnorms[k * rows + b]);
    }
    norms[b] = rule.unit * std::sqrt(total);
    shares[b] = std::numeric_limits<double>::quiet_NaN();
    if (!live) {
      for (int64_t k = 0; k < groups; ++k) factors[k * rows + b] = 0.0f;
      continue;
    }
    const double given = weights == nullptr ? 1.0 : weights[b];
    const double weight = given > 0.0 ? std::min(given, 1.0) : 0.0;
    double length = 0.0;
    for (int64_t k = 0; k < groups; ++k) {
      const double n = rule.unit * std::sqrt(sqnorms[k * rows + b]);
      const double full = full_factor(rule, thresholds[k] * rule.slack, n);
      length += full * n * (full * n);
      const double c = rule.kind == ClipKind::threshold ? std::min(weight, full) : weight * full;
      const float factor = static_cast<float>(c * rule.unit / rule.denominator);
      factors[k * rows + b] = factor < kLeast ? 0.0f : factor;
    }
    shares[b] = std::min(1.0, std::sqrt(length / bound));
  }
}

}  // namespace adaclip
