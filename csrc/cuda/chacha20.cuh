// ChaCha20 (RFC 8439) with one block in the registers of each thread; addresses as in core/chacha20.h.
#pragma once

#include <cstdint>

#include "core/chacha20.h"

namespace adaclip::cuda {

// `one` is 1, and the compiler must not know: a sum written as a multiply-add then goes to the multipliers'
// pipe, where the pipe of exclusive ors and rotations would have to take all twelve operations.
__device__ __forceinline__ void quarter_round(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d,
                                              uint32_t one) {
  a += b * one, d ^= a, d = __funnelshift_l(d, d, 16);
  c += d * one, b ^= c, b = __funnelshift_l(b, b, 12);
  a += b * one, d ^= a, d = __funnelshift_l(d, d, 8);
  c += d * one, b ^= c, b = __funnelshift_l(b, b, 7);
}

// words = the block of the keystream with that number. key: [8]; one: 1, read at run time.
__device__ __forceinline__ void chacha20_block(const uint32_t* key, uint64_t step, uint32_t stream,
                                               uint32_t counter, uint32_t one, uint32_t words[kBlockWords]) {
  const uint32_t start[kBlockWords] = {0x61707865,
                                       0x3320646e,
                                       0x79622d32,
                                       0x6b206574,
                                       key[0],
                                       key[1],
                                       key[2],
                                       key[3],
                                       key[4],
                                       key[5],
                                       key[6],
                                       key[7],
                                       counter,
                                       static_cast<uint32_t>(step),
                                       static_cast<uint32_t>(step >> 32),
                                       stream};
#pragma unroll
  for (int w = 0; w < kBlockWords; ++w) words[w] = start[w];
  // Two: a round less and registers are moved about, many more and the loop outgrows the instruction cache.
#pragma unroll 2
  for (int round = 0; round < 10; ++round) {
    quarter_round(words[0], words[4], words[8], words[12], one);
    quarter_round(words[1], words[5], words[9], words[13], one);
    quarter_round(words[2], words[6], words[10], words[14], one);
    quarter_round(words[3], words[7], words[11], words[15], one);
    quarter_round(words[0], words[5], words[10], words[15], one);
    quarter_round(words[1], words[6], words[11], words[12], one);
    quarter_round(words[2], words[7], words[8], words[13], one);
    quarter_round(words[3], words[4], words[9], words[14], one);
  }
#pragma unroll
  for (int w = 0; w < kBlockWords; ++w) words[w] += start[w];
}

}  // namespace adaclip::cuda
