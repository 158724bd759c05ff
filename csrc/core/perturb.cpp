#include "core/perturb.h"

#include "core/chunk_loop.h"
#include "core/simd.h"

namespace adaclip {

namespace portable {
void perturb(const Keystream&, const PerturbTensor&, bool, float, int64_t, int64_t);
}
#if defined(__x86_64__)
namespace avx2 {
void perturb(const Keystream&, const PerturbTensor&, bool, float, int64_t, int64_t);
}
namespace avx512 {
void perturb(const Keystream&, const PerturbTensor&, bool, float, int64_t, int64_t);
}
#endif

void perturb(const Keystream& ks, const PerturbTensor* tensors, int64_t count, bool draw, float sign,
             int threads) {
  auto move = portable::perturb;
#if defined(__x86_64__)
  if (simd_level() == Simd::avx512) move = avx512::perturb;
  if (simd_level() == Simd::avx2) move = avx2::perturb;
#endif
  for_chunks(tensors, count, 64, threads, [&](const PerturbTensor& t, int64_t begin, int64_t end) {
    move(ks, t, draw, sign, begin, end);
  });
}

}  // namespace adaclip
