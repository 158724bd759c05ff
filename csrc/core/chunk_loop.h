// One parallel loop over the keystream chunks of many tensors: work is shared evenly whatever their sizes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/normal.h"
#include "core/parallel.h"

namespace adaclip {

// Calls body(tensor, begin, end) for ranges [begin, end) of chunks of each tensor, on up to `threads`
// threads. Tensors have n and first_chunk, and come in order: each begins at the chunk where the one
// before ended.
template <class Tensor, class Body>
void for_chunks(const Tensor* tensors, int64_t count, int64_t grain, int threads, Body body) {
  if (count == 0) return;
  const auto chunks = [](const Tensor& t) { return (t.n + kChunkNormals - 1) / kChunkNormals; };
  const Tensor* const stop = tensors + count;
  const int64_t first = tensors->first_chunk;
  const int64_t total = stop[-1].first_chunk + chunks(stop[-1]) - first;
  parallel_for(total, grain, threads, [&](int64_t begin, int64_t end, int) {
    begin += first, end += first;
    auto t = std::upper_bound(tensors, stop, begin,
                              [](int64_t chunk, const Tensor& s) { return chunk < s.first_chunk; }) -
             1;
    for (; t != stop && t->first_chunk < end; ++t) {
      const int64_t from = std::max(begin, t->first_chunk), to = std::min(end, t->first_chunk + chunks(*t));
      if (from < to) body(*t, from - t->first_chunk, to - t->first_chunk);
    }
  });
}

}  // namespace adaclip
