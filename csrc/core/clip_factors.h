// From per-sample norms to clipping factors: what each sample's gradient is multiplied by.
#pragma once

#include <cstdint>

namespace adaclip {

enum class ClipKind {
  threshold,   // min(w, C / n)
  normalized,  // w C / (n + s)
  psac,        // w C / (n + s / (n + s))
};

struct ClipRule {
  ClipKind kind;
  double stability;    // s > 0; not used by threshold
  double slack;        // what C is multiplied by, so that float32 rounding stays inside the bound
  double unit;         // n_k = unit * sqrt(sqnorm_k)
  double denominator;  // of the released sum
};

// sqnorms [K, B], thresholds [K] -> factors [K, B] = c unit / denominator, norms [B] (over all K),
// shares [B] = sqrt(sum_k (c_k n_k)^2 / sum_k C_k^2) at weight 1, at most 1.
//
// weights [B] in [0, 1] or null (1 each); what is above 1 counts as 1, and nan as 0. Columns from `real` on
// and those with a squared norm that is negative or not finite have factor 0 and share nan. Factors below
// 2^-100 are 0: a denormal one has lost the digits that made it safe.
void clip_factors(const double* sqnorms, const double* thresholds, const double* weights, int64_t groups,
                  int64_t rows, int64_t real, const ClipRule& rule, float* factors, double* norms,
                  double* shares);

}  // namespace adaclip
