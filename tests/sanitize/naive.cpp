#include "naive.h"

#include <cmath>

namespace checks {

Gradient conv_gradient(const adaclip::ConvShape& s, const float* x, const float* g) {
  const int64_t in = s.in_channels / s.groups, out = s.out_channels / s.groups;
  const int64_t in_plane = s.in[0] * s.in[1] * s.in[2], out_plane = s.out[0] * s.out[1] * s.out[2];
  const int64_t taps = s.kernel[0] * s.kernel[1] * s.kernel[2];
  Gradient made;
  made.gradient.resize(s.out_channels * in * taps);
  made.absolute.resize(made.gradient.size());
  std::vector<double> reach(s.groups * taps);  // sum_t |g_t| |x_pos(t, tap)|, of one group and tap
  for (int64_t group = 0; group < s.groups; ++group)
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t t = 0; t < out_plane; ++t) {
        const int64_t k[3] = {tap / s.kernel[2] / s.kernel[1], tap / s.kernel[2] % s.kernel[1],
                              tap % s.kernel[2]};
        const int64_t o[3] = {t / s.out[2] / s.out[1], t / s.out[2] % s.out[1], t % s.out[2]};
        int64_t at = 0;
        bool inside = true;
        for (int a = 0; a < 3; ++a) {
          const int64_t i = s.stride[a] * o[a] + s.dilation[a] * k[a] - s.padding[a];
          inside = inside && i >= 0 && i < s.in[a];
          at = at * s.in[a] + i;
        }
        if (!inside) continue;
        double gg = 0, xx = 0;
        for (int64_t co = group * out; co < (group + 1) * out; ++co)
          gg += double{g[co * out_plane + t]} * g[co * out_plane + t];
        for (int64_t ci = 0; ci < in; ++ci) {
          const double value = x[(group * in + ci) * in_plane + at];
          xx += value * value;
          for (int64_t co = group * out; co < (group + 1) * out; ++co) {
            const double product = g[co * out_plane + t] * value;
            made.gradient[(co * in + ci) * taps + tap] += product;
            made.absolute[(co * in + ci) * taps + tap] += std::fabs(product);
          }
        }
        reach[group * taps + tap] += std::sqrt(gg * xx);
      }
  for (double value : made.gradient) made.sqnorm += value * value;
  for (double value : reach) made.magnitude += value * value;
  return made;
}

Gradient linear_gradient(int64_t positions, int64_t in, int64_t out, const float* a, const float* g) {
  Gradient made;
  made.gradient.resize(out * in);
  made.absolute.resize(out * in);
  double reach = 0;
  for (int64_t t = 0; t < positions; ++t) {
    double aa = 0, gg = 0;
    for (int64_t i = 0; i < in; ++i) aa += double{a[t * in + i]} * a[t * in + i];
    for (int64_t o = 0; o < out; ++o) {
      gg += double{g[t * out + o]} * g[t * out + o];
      for (int64_t i = 0; i < in; ++i) {
        const double product = double{g[t * out + o]} * a[t * in + i];
        made.gradient[o * in + i] += product;
        made.absolute[o * in + i] += std::fabs(product);
      }
    }
    reach += std::sqrt(aa * gg);
  }
  for (double value : made.gradient) made.sqnorm += value * value;
  made.magnitude = reach * reach;
  return made;
}

}  // namespace checks
