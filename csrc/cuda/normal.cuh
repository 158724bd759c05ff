// Standard normals from keystream words by Box-Muller: core/normal.h has layout and guarantees,
// core/normal.inc the same formulas. The bits are the CPU core's.
#pragma once

#include "core/normal.h"
#include "cuda/exact.cuh"

namespace adaclip::cuda {

// -2 ln u, where u = (high * 2^31 + (low mod 2^31 | 1)) / 2^63.
__device__ __forceinline__ F32 minus_two_log(uint32_t high, uint32_t low) {
  const bool above = static_cast<int32_t>(high) < 0;
  const F32 c = to_float(high) + to_float((low & 0x7fffffffu) | 1) * 0x1p-31f;
  F32 e = to_float((c.bits() >> 23) - 127) - 31.0f;
  const F32 mantissa = F32::of_bits((c.bits() & 0x007fffffu) | 0x3f000000u);
  const F32 f = above ? c * 0x1p-32f : mantissa - 1.0f;
  e = above ? F32(0.0f) : e * -1.38629436112f;
  const F32 s = f / (f + 2.0f);
  const F32 z = s * s;
  F32 t = z * -0.560489177507f - 0.559982821407f;
  t = t * z - 0.800433981192f;
  t = t * z - 1.33332826265f;
  t = t * (z * s) - s * 4.0f;
  return t + e;
}

// The pair of normals that three words make.
__device__ __forceinline__ void box_muller(uint32_t high, uint32_t low, uint32_t angle, float& cosine,
                                           float& sine) {
  const F32 radius = root(minus_two_log(high, low));
  const F32 x = to_float(angle << 2) * 0x1.921fb6p-32f;
  const F32 y = x * x;
  F32 s = y * -0.000195172989843f + 0.00833217814618f;
  F32 c = y * -0.00135978231103f + 0.0416562945787f;
  s = s * y - 0.166666549437f;
  c = c * y - 0.499998947814f;
  s = (s * y) * x + x;
  c = c * y + 1.0f;
  const uint32_t quarter = angle + 0x20000000u;
  const bool swap = (quarter & 0x40000000u) != 0;
  const uint32_t up = (swap ? s : c).bits() ^ ((quarter + 0x40000000u) & 0x80000000u);
  const uint32_t across = (swap ? c : s).bits() ^ (quarter & 0x80000000u);
  cosine = (radius * F32::of_bits(up)).value;
  sine = (radius * F32::of_bits(across)).value;
}

}  // namespace adaclip::cuda
