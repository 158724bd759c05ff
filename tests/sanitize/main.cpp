// Every kernel of the core on every instruction set that this CPU has: alone with 1 to 5 threads, then
// called by four threads at once, as data-parallel training in one process does.
#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

#include "checks.h"
#include "core/parallel.h"
#include "core/simd.h"

namespace {

using Family = int (*)(uint64_t seed, int threads);
struct Named {
  const char* name;
  Family run;
};
const Named kFamilies[] = {
    {"convolution", checks::check_convolutions},
    {"linear", checks::check_linears},
    {"group norm", checks::check_group_norms},
    {"rows", checks::check_rows},
    {"clipping", checks::check_clipping},
    {"keystream", checks::check_keystreams},
    {"noise", checks::check_noise},
};

// parallel_ranges itself: every index once, in ranges that do not overlap, whatever is asked for.
int check_ranges(uint64_t, int threads) {
  int cases = 0;
  for (int64_t n : {-1, 0, 1, 2, 7, 1000})
    for (int64_t grain : {-1, 0, 1, 3, 5000}) {
      checks::Buffer<int> seen(n < 0 ? 0 : n, 0);
      adaclip::parallel_for(n, grain, threads, [&](int64_t begin, int64_t end, int worker) {
        CHECK(worker >= 0 && worker < threads, "worker %d of %d", worker, threads);
        for (int64_t i = begin; i < end; ++i) ++seen[i];
      });
      for (int64_t i = 0; i < n; ++i) CHECK(seen[i] == 1, "index %lld", static_cast<long long>(i));
      ++cases;
    }
  return cases;
}

}  // namespace

int main() {
  // torch's OpenMP runtime is not here; if it were, the thread sanitizer would not see its barriers.
  CHECK(std::strcmp(adaclip::threading_backend(), "std") == 0, "the loops run on %s",
        adaclip::threading_backend());
  for (auto level : {adaclip::Simd::portable, adaclip::Simd::avx2, adaclip::Simd::avx512}) {
    if (!adaclip::set_simd_level(level)) {
      std::printf("%s: not on this CPU\n", adaclip::simd_name(level));
      continue;
    }
    int cases = check_ranges(0, 1) + check_ranges(0, 4);
    for (const Named& family : kFamilies)
      for (int threads : {1, 2, 5}) cases += family.run(static_cast<uint64_t>(threads), threads);
    std::atomic<int> together{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller)
      callers.emplace_back([&together, caller] {
        for (const Named& family : kFamilies) together += family.run(100 + static_cast<uint64_t>(caller), 2);
      });
    for (auto& caller : callers) caller.join();
    std::printf("%s: %d cases alone, %d from four threads at once\n", adaclip::simd_name(level), cases,
                together.load());
  }
  return 0;
}
