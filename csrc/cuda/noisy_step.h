// core/noisy_step.h on an NVIDIA GPU: one launch makes the noise, adds it and applies the update, over all
// tensors. Same keystream, same formulas, same bits.
//
// Everything that may change from step to step is read from device memory, so that a captured graph can be
// replayed: the step counter moves there, and so do rules, standard deviations and addresses.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/noisy_step.h"

namespace adaclip::cuda {

// Where a keystream is: the pointers are to device memory, in host byte order.
struct NoiseAddress {
  const uint32_t* key;   // [8]: words of the key, each little-endian of 4 of its bytes
  const uint64_t* step;  // [1]
  uint32_t stream;
};

constexpr int kTileChunks = 16;  // chunks of one tensor that one thread block takes

// The tensors of a step, in device memory: a StepTensor is a row of the first four arrays.
struct StepTable {
  // [tensors][4]: addresses of param, grad, momentum, square; 0 where StepTensor has null.
  const int64_t* pointers;
  const int64_t* numel;        // [tensors]
  const int64_t* first_chunk;  // [tensors]: of its noise
  const StepRule* rules;       // [tensors]
  // [tile_count][2]: a tensor, and the tile's first chunk within it, a multiple of kTileChunks.
  const int32_t* tiles;
  int64_t tile_count;
};

// Applies the update of core/noisy_step.h to every tensor of the table; tiles cover each element once.
// Tensors are float32 at any address that is a multiple of 4. Where all addresses of a tensor are multiples
// of 16, all of it but the last elements, fewer than 640, goes 16 bytes at a time. The caller keeps every
// chunk below kStreamChunks and tile_count below 2^31. No noise is made where std is 0.
//
// Returns the launch's error; what the kernel itself meets is reported by a later call, as usual.
cudaError_t noisy_step(const NoiseAddress& noise, const StepTable& table, cudaStream_t stream);

}  // namespace adaclip::cuda
