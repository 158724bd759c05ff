#include "core/noisy_step.h"

#include "core/chunk_loop.h"
#include "core/simd.h"

namespace adaclip {

namespace portable {
void noisy_step(const Keystream&, const StepTensor&, int64_t, int64_t);
}
#if defined(__x86_64__)
namespace avx2 {
void noisy_step(const Keystream&, const StepTensor&, int64_t, int64_t);
}
namespace avx512 {
void noisy_step(const Keystream&, const StepTensor&, int64_t, int64_t);
}
#endif

void noisy_step(const Keystream& ks, const StepTensor* tensors, int64_t count, int threads) {
  auto update = portable::noisy_step;
#if defined(__x86_64__)
  if (simd_level() == Simd::avx512) update = avx512::noisy_step;
  if (simd_level() == Simd::avx2) update = avx2::noisy_step;
#endif
  for_chunks(tensors, count, 32, threads,
             [&](const StepTensor& t, int64_t begin, int64_t end) { update(ks, t, begin, end); });
}

}  // namespace adaclip
