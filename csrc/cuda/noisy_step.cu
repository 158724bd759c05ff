// The noisy update: a warp makes the noise of four chunks at a time, one block of keystream in each thread's
// registers, and turns it round in shared memory, so that every access to global memory is of 16 bytes and
// every warp's of 512 in a row.
#include "cuda/chacha20.cuh"
#include "cuda/exact.cuh"
#include "cuda/noisy_step.h"
#include "cuda/normal.cuh"

namespace adaclip::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kWarpChunks = kTileChunks / kWarps;
constexpr int kWarpElements = kWarpChunks * kChunkNormals;
// Two chunks are made at a time, by the two halves of a warp: 16 floats more between them put the halves'
// stores in different banks, and keep groups of four aligned.
constexpr int kChunkRoom = kChunkNormals + 16;

static_assert(kWarpChunks * kWarps == kTileChunks && kWarpChunks % 2 == 0);
static_assert(kWarpElements % (4 * 32) == 0, "a warp takes whole rounds of 16 bytes a thread");
static_assert(sizeof(StepRule) == 14 * sizeof(float));

enum class Kind { plain, momentum, adaptive, corrected };

struct Tensor {
  float* param;
  const float* grad;
  float* momentum;
  float* square;
};

// The addresses come from a table, and the compiler cannot know by itself that they are of global memory.
template <class T>
__device__ __forceinline__ T read(const T* at) {
  __builtin_assume(__isGlobal(at));
  return *at;
}
template <class T>
__device__ __forceinline__ T read_once(const T* at) {
  return __ldcs(at);  // a gradient: nothing reads it again
}
template <class T>
__device__ __forceinline__ void write(T* at, T value) {
  __builtin_assume(__isGlobal(at));
  *at = value;
}

// One element: core/noisy_step.inc's formulas.
template <Kind kind>
__device__ __forceinline__ void update(const StepRule& r, F32 noisy, float& param, float& momentum,
                                       float& square) {
  const F32 p = param;
  const F32 g = F32(r.sign) * noisy + F32(r.l2) * p;
  F32 move = F32(r.direct) * g;
  if constexpr (kind != Kind::plain) {
    const F32 m = F32(r.decay) * momentum + F32(r.keep) * g;
    momentum = m.value;
    move = move + F32(r.follow) * m;
  }
  if constexpr (kind == Kind::adaptive || kind == Kind::corrected) {
    const F32 v = F32(r.square_decay) * square + F32(r.square_keep) * (g * g);
    square = v.value;
    if constexpr (kind == Kind::adaptive) {
      move = move / (root(v) * r.scale + r.eps);
    } else {
      const F32 signal = v * r.scale - r.variance;
      move = move / (root(signal.value > r.floor_sq ? signal : F32(r.floor_sq)) + r.eps);
    }
  }
  param = (F32(r.shrink) * p - move).value;
}

// grad + std z, and exactly the one that there is where the other is not.
__device__ __forceinline__ F32 noisy_gradient(bool has_grad, float grad, float std, float z) {
  if (std == 0.0f) return grad;
  const F32 noise = F32(std) * z;
  return has_grad ? F32(grad) + noise : noise;
}

// kWarpElements elements at `at`, all there, all addresses multiples of 16.
template <Kind kind>
__device__ __forceinline__ void update_whole(const StepRule& r, const Tensor& t, int64_t at, int lane,
                                             const float* z) {
  constexpr bool has_momentum = kind != Kind::plain;
  constexpr bool has_square = kind == Kind::adaptive || kind == Kind::corrected;
  float4* const params = reinterpret_cast<float4*>(t.param + at);
  const float4* const grads = reinterpret_cast<const float4*>(t.grad + at);
  float4* const momenta = reinterpret_cast<float4*>(t.momentum + at);
  float4* const squares = reinterpret_cast<float4*>(t.square + at);
  const bool has_grad = t.grad != nullptr;
  const float4 zeros = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
  for (int round = 0; round < kWarpElements / (4 * 32); ++round) {
    const int i = round * 32 + lane;
    float4 p = read(params + i), m = zeros, v = zeros, g = zeros, n = zeros;
    if constexpr (has_momentum) m = read(momenta + i);
    if constexpr (has_square) v = read(squares + i);
    if (has_grad) g = read_once(grads + i);
    if (r.std != 0.0f) n = *reinterpret_cast<const float4*>(z + i / 40 * kChunkRoom + i % 40 * 4);
    update<kind>(r, noisy_gradient(has_grad, g.x, r.std, n.x), p.x, m.x, v.x);
    update<kind>(r, noisy_gradient(has_grad, g.y, r.std, n.y), p.y, m.y, v.y);
    update<kind>(r, noisy_gradient(has_grad, g.z, r.std, n.z), p.z, m.z, v.z);
    update<kind>(r, noisy_gradient(has_grad, g.w, r.std, n.w), p.w, m.w, v.w);
    write(params + i, p);
    if constexpr (has_momentum) write(momenta + i, m);
    if constexpr (has_square) write(squares + i, v);
  }
}

// Up to kWarpElements elements at `at`, at any address.
template <Kind kind>
__device__ __forceinline__ void update_some(const StepRule& r, const Tensor& t, int64_t at, int count,
                                            int lane, const float* z) {
  constexpr bool has_momentum = kind != Kind::plain;
  constexpr bool has_square = kind == Kind::adaptive || kind == Kind::corrected;
#pragma unroll 1
  for (int i = lane; i < count; i += 32) {
    float p = read(t.param + at + i), m = 0.0f, v = 0.0f;
    if constexpr (has_momentum) m = read(t.momentum + at + i);
    if constexpr (has_square) v = read(t.square + at + i);
    const float g = t.grad ? read_once(t.grad + at + i) : 0.0f;
    const float n = r.std != 0.0f ? z[i / kChunkNormals * kChunkRoom + i % kChunkNormals] : 0.0f;
    update<kind>(r, noisy_gradient(t.grad != nullptr, g, r.std, n), p, m, v);
    write(t.param + at + i, p);
    if constexpr (has_momentum) write(t.momentum + at + i, m);
    if constexpr (has_square) write(t.square + at + i, v);
  }
}

template <Kind kind>
__device__ __forceinline__ void update_chunks(const StepRule& r, const Tensor& t, int64_t at, int64_t left,
                                              bool aligned, int lane, const float* z) {
  if (aligned && left >= kWarpElements)
    update_whole<kind>(r, t, at, lane, z);
  else
    update_some<kind>(r, t, at, left < kWarpElements ? static_cast<int>(left) : kWarpElements, lane, z);
}

// z[chunk][kChunkRoom] = the normals of kWarpChunks chunks of the stream from `chunk` on; half a warp makes
// one.
__device__ __forceinline__ void make_normals(const NoiseAddress& noise, int64_t chunk, uint32_t one, int lane,
                                             float* z) {
#pragma unroll 1
  for (int pass = 0; pass < kWarpChunks / 2; ++pass) {
    uint32_t words[kBlockWords];
    const int64_t block = (chunk + 2 * pass) * kChunkBlocks + lane;
    chacha20_block(noise.key, *noise.step, noise.stream, static_cast<uint32_t>(block), one, words);
    float* const out = z + (2 * pass + lane / kChunkBlocks) * kChunkRoom + lane % kChunkBlocks;
#pragma unroll
    for (int k = 0; k < 5; ++k) {
      float cosine, sine;
      box_muller(words[3 * k], words[3 * k + 1], words[3 * k + 2], cosine, sine);
      out[32 * k] = cosine;
      out[32 * k + 16] = sine;
    }
  }
}

__global__ void __launch_bounds__(kWarps * 32)
    noisy_step_kernel(const __grid_constant__ NoiseAddress noise, const __grid_constant__ StepTable table,
                      uint32_t one) {
  __shared__ __align__(16) float normals[kWarps][kWarpChunks * kChunkRoom];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t* const tile = table.tiles + int64_t{2} * blockIdx.x;
  const int64_t tensor = tile[0];
  const int64_t chunk = int64_t{tile[1]} + warp * kWarpChunks;
  const int64_t at = chunk * kChunkNormals, left = table.numel[tensor] - at;
  if (left <= 0) return;  // the whole warp: nothing below waits for other warps

  const int64_t* const addresses = table.pointers + 4 * tensor;
  const Tensor t{reinterpret_cast<float*>(addresses[0]), reinterpret_cast<const float*>(addresses[1]),
                 reinterpret_cast<float*>(addresses[2]), reinterpret_cast<float*>(addresses[3])};
  const bool aligned = ((addresses[0] | addresses[1] | addresses[2] | addresses[3]) & 15) == 0;
  const StepRule rule = table.rules[tensor];
  float* const z = normals[warp];
  if (rule.std != 0.0f) {
    make_normals(noise, table.first_chunk[tensor] + chunk, one, lane, z);
    __syncwarp();
  }
  if (t.square && rule.floor_sq >= 0.0f)
    update_chunks<Kind::corrected>(rule, t, at, left, aligned, lane, z);
  else if (t.square)
    update_chunks<Kind::adaptive>(rule, t, at, left, aligned, lane, z);
  else if (t.momentum)
    update_chunks<Kind::momentum>(rule, t, at, left, aligned, lane, z);
  else
    update_chunks<Kind::plain>(rule, t, at, left, aligned, lane, z);
}

}  // namespace

cudaError_t noisy_step(const NoiseAddress& noise, const StepTable& table, cudaStream_t stream) {
  if (table.tile_count == 0) return cudaSuccess;
  const unsigned blocks = static_cast<unsigned>(table.tile_count);
  noisy_step_kernel<<<blocks, kWarps * 32, 0, stream>>>(noise, table, 1);
  return cudaGetLastError();
}

}  // namespace adaclip::cuda
