// A float whose every operation is one correctly rounded IEEE operation: no multiply-add contracts, whatever
// the compiler's flags (but -ftz=true, which this library never sets, would flush subnormals). Formulas
// written in it give the CPU core's bits.
#pragma once

#include <cstdint>

namespace adaclip::cuda {

struct F32 {
  float value;

  __device__ __forceinline__ F32(float v) : value(v) {}
  __device__ __forceinline__ static F32 of_bits(uint32_t bits) { return __uint_as_float(bits); }
  __device__ __forceinline__ uint32_t bits() const { return __float_as_uint(value); }
};

__device__ __forceinline__ F32 operator+(F32 a, F32 b) { return __fadd_rn(a.value, b.value); }
__device__ __forceinline__ F32 operator-(F32 a, F32 b) { return __fsub_rn(a.value, b.value); }
__device__ __forceinline__ F32 operator*(F32 a, F32 b) { return __fmul_rn(a.value, b.value); }
__device__ __forceinline__ F32 operator/(F32 a, F32 b) { return __fdiv_rn(a.value, b.value); }
__device__ __forceinline__ F32 root(F32 a) { return __fsqrt_rn(a.value); }
__device__ __forceinline__ F32 to_float(uint32_t signed_bits) {
  return __int2float_rn(static_cast<int32_t>(signed_bits));
}

}  // namespace adaclip::cuda
