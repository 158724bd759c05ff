// Stand-ins for what csrc/cuda takes from CUDA, so that a C++ compiler builds a kernel for the CPU: a block's
// threads are threads, blocks run one after the other, and shared memory is static. Slow, and for values
// only.
#pragma once

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_assume(condition) static_cast<void>(condition)

struct alignas(16) float4 {
  float x, y, z, w;
};
struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

// What a GPU would trap on, and how many accesses of 16 bytes there were.
inline std::atomic<int64_t> misaligned_accesses{0}, wide_accesses{0};
template <class T>
bool __isGlobal(const T* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T) != 0) ++misaligned_accesses;
  if (sizeof(T) == 16) ++wide_accesses;
  return true;
}
template <class T>
T __ldcs(const T* at) {
  __isGlobal(at);
  return *at;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __int2float_rn(int32_t a) { return static_cast<float>(a); }
inline float __uint_as_float(uint32_t bits) {
  float a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
}
inline uint32_t __float_as_uint(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof a);
  return bits;
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, int n) { return high << n | low >> (32 - n); }

inline thread_local std::barrier<>* warp_barrier;
inline void __syncwarp() { warp_barrier->arrive_and_wait(); }

// kernel<<<blocks, threads, ...>>>(arguments...) is rewritten to this.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Arguments... arguments) {
  for (unsigned block = 0; block < blocks; ++block) {
    std::deque<std::barrier<>> warps;
    for (unsigned w = 0; w < threads / 32; ++w) warps.emplace_back(32);
    std::vector<std::thread> team;
    for (unsigned t = 0; t < threads; ++t)
      team.emplace_back([=, &warps] {
        threadIdx.x = t, blockIdx.x = block;
        warp_barrier = &warps[t / 32];
        kernel(arguments...);
      });
    for (auto& thread : team) thread.join();
  }
}
