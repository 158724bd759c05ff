// The few operations of a GPU that a kernel needs beyond C++, for sm_80 and later. A kernel written against
// this interface also runs on the emulation in the tests, which has the same names.
#pragma once

#include <cstdint>

#include "cuda/device.h"

namespace adaclip {
namespace cuda {

struct Machine {
  static ADACLIP_DEVICE int thread() { return threadIdx.x; }
  static ADACLIP_DEVICE int block() { return blockIdx.x; }

  static ADACLIP_DEVICE void barrier() { __syncthreads(); }

  static ADACLIP_DEVICE uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
  }

  // 16 bytes from global to shared memory, or zeros; done when `wait` says so.
  static ADACLIP_DEVICE void copy16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
  }

  static ADACLIP_DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

  // Waits until at most `pending` (0, 1 or 2) of this thread's committed groups are under way.
  static ADACLIP_DEVICE void wait(int pending) {
    if (pending == 0) {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    } else if (pending == 1) {
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 2;" ::: "memory");
    }
  }

  // Four matrices of 8 rows of 16 bytes; lane l gives the address of row l % 8 of matrix l / 8, and gets the
  // four bytes at 4 (l % 4) of row l / 4 of each.
  static ADACLIP_DEVICE void load_matrices(uint32_t (&out)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(shared))
                 : "memory");
  }

  // d [16, 8] += a [16, k] b [8, k]^T with k = 16 (bf16, fp16) or 8 (tf32: the low 13 bits must be zero).
  static ADACLIP_DEVICE void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static ADACLIP_DEVICE void multiply_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static ADACLIP_DEVICE void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }

  template <typename T>
  static ADACLIP_DEVICE T shuffle_xor(T v, int mask) {
    return __shfl_xor_sync(0xffffffffu, v, mask);
  }

  // v, and the compiler does not know that it is.
  static ADACLIP_DEVICE int opaque(int v) {
    asm volatile("" : "+r"(v));
    return v;
  }

  static ADACLIP_DEVICE uint32_t bits(float v) { return __float_as_uint(v); }
  static ADACLIP_DEVICE float value(uint32_t v) { return __uint_as_float(v); }
  // Rounded toward +infinity: bounds stay bounds.
  static ADACLIP_DEVICE float fma_up(float a, float b, float c) { return __fmaf_ru(a, b, c); }
  static ADACLIP_DEVICE float add_up(float a, float b) { return __fadd_ru(a, b); }
  static ADACLIP_DEVICE float sqrt_up(float a) { return __fsqrt_ru(a); }
};

}  // namespace cuda
}  // namespace adaclip
