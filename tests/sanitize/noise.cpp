// Keystream, sampling and noise against the RFC's own steps and Box-Muller in long double.
#include <algorithm>
#include <numeric>

#include "checks.h"
#include "core/bernoulli.h"
#include "core/chacha20.h"
#include "core/noisy_step.h"
#include "core/normal.h"
#include "core/perturb.h"

namespace checks {
namespace {

using adaclip::kChunkNormals;

adaclip::Keystream random_keystream(Random& random) {
  uint8_t key[32];
  for (uint8_t& byte : key) byte = static_cast<uint8_t>(random.engine());
  return adaclip::make_keystream(key, random.engine(), static_cast<uint32_t>(random.engine()));
}

int64_t chunks(int64_t n) { return (n + kChunkNormals - 1) / kChunkNormals; }

// Some that pass block 2^31, and the last ones of a stream.
int64_t random_first(Random& random, int64_t count) {
  return random.one_of<int64_t>({0, 7, (int64_t{1} << 27) - 1, adaclip::kStreamChunks - count});
}

// The normals by the definition in core/normal.h.
std::vector<double> exact_normals(const adaclip::Keystream& ks, int64_t chunk) {
  std::vector<double> z(kChunkNormals);
  for (int b = 0; b < adaclip::kChunkBlocks; ++b) {
    uint32_t w[adaclip::kBlockWords];
    adaclip::chacha20_block(ks, static_cast<uint32_t>(chunk * adaclip::kChunkBlocks + b), w);
    for (int k = 0; k < 5; ++k) {
      const uint64_t bits = (uint64_t{w[3 * k]} << 31) + ((w[3 * k + 1] & 0x7fffffffu) | 1);
      const long double radius = std::sqrt(-2 * std::log(static_cast<long double>(bits) * 0x1p-63L));
      const long double angle = 2 * 3.14159265358979323846264338327950288L * w[3 * k + 2] * 0x1p-32L;
      z[32 * k + b] = static_cast<double>(radius * std::cos(angle));
      z[32 * k + 16 + b] = static_cast<double>(radius * std::sin(angle));
    }
  }
  return z;
}

int64_t random_size(Random& random) {
  return random.one_of<int64_t>({0, 1, 159, 160, 161, 480, 5121, 20000});
}

void check_step(Random& random, int threads) {
  const auto ks = random_keystream(random);
  const int64_t count = random.between(0, 5);
  std::vector<Buffer<float>> params, grads, momenta, squares, noises;
  std::vector<adaclip::StepTensor> tensors;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = random_size(random);
    for (auto* list : {&params, &grads, &momenta, &squares}) list->push_back(random.floats(n));
    for (int64_t k = 0; k < n; ++k) squares.back()[k] = std::fabs(squares.back()[k]) + 0.1f;
  }
  const std::vector<Buffer<float>> before = params, momenta_before = momenta, squares_before = squares;
  int64_t all = 0;
  for (const auto& p : params) all += chunks(p.size());
  int64_t at = random_first(random, all);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = params[i].size();
    const int kind =
        static_cast<int>(random.between(0, 3));  // plain, momentum, squares, squares without the noise
    const float floor_sq = kind == 3 ? 0.01f : -1.0f, std = random.one_of({0.0f, 0.3f});
    tensors.push_back(
        {params[i].get(),
         random.uniform() < 0.8 ? grads[i].get() : nullptr,
         kind > 0 ? momenta[i].get() : nullptr,
         kind > 1 ? squares[i].get() : nullptr,
         n,
         at,
         {std, -1.0f, 0.01f, 0.99f, 0.9f, 0.1f, 0.2f, 0.7f, 0.99f, 0.01f, 1.5f, 1e-3f, 0.05f, floor_sq}});
    at += chunks(n);
  }
  adaclip::noisy_step(ks, tensors.data(), count, threads);
  for (int64_t i = 0; i < count; ++i) {
    const auto& t = tensors[i];
    const auto& r = t.rule;
    Buffer<float> z(t.n);
    adaclip::normal_fill(ks, t.first_chunk, z.get(), t.n, 1.0f, false, 1);
    for (int64_t k = 0; k < t.n; ++k) {
      const double n = (t.grad ? grads[i][k] : 0.0) + double{r.std} * z[k];
      const double g = double{r.sign} * n + double{r.l2} * before[i][k];
      const double m = double{r.decay} * momenta_before[i][k] + double{r.keep} * g;
      const double v = double{r.square_decay} * squares_before[i][k] + double{r.square_keep} * g * g;
      double divisor = 1.0;
      if (t.square)
        divisor = r.floor_sq < 0 ? std::sqrt(v) * r.scale + r.eps
                                 : std::sqrt(std::max(v * r.scale - r.variance, double{r.floor_sq})) + r.eps;
      const double move = double{r.direct} * g + (t.momentum ? double{r.follow} * m : 0.0);
      // Near its floor the corrected divisor loses digits of v * scale - variance.
      CHECK_NEAR(params[i][k], double{r.shrink} * before[i][k] - move / divisor,
                 1e-5 * (1 + std::fabs(move) / (divisor * divisor)));
      if (t.momentum) CHECK_NEAR(momenta[i][k], m, 1e-5);
      if (t.square) CHECK_NEAR(squares[i][k], v, 1e-5 * (1 + v));
      CHECK(t.momentum || momenta[i][k] == momenta_before[i][k], "momentum changed");
    }
  }
}

void check_perturb(Random& random, int threads) {
  const auto ks = random_keystream(random);
  const int64_t count = random.between(0, 4);
  std::vector<Buffer<float>> params, outs, shifts, directions;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = random_size(random);
    params.push_back(random.floats(n)), directions.push_back(random.floats(n));
    shifts.push_back(random.floats(n)), outs.emplace_back(n);
  }
  const std::vector<Buffer<float>> before = shifts;
  std::vector<adaclip::PerturbTensor> tensors;
  int64_t at = 3;
  for (int64_t i = 0; i < count; ++i) {
    tensors.push_back({params[i].get(), outs[i].get(), random.uniform() < 0.7 ? shifts[i].get() : nullptr,
                       random.uniform() < 0.5 ? directions[i].get() : nullptr, params[i].size(), at, 0.5f,
                       2.0f});
    at += chunks(params[i].size());
  }
  const bool draw = random.uniform() < 0.5;
  adaclip::perturb(ks, tensors.data(), count, draw, -1.0f, threads);
  for (int64_t i = 0; i < count; ++i) {
    Buffer<float> z(params[i].size());
    adaclip::normal_fill(ks, tensors[i].first_chunk, z.get(), z.size(), 0.5f, false, 1);
    for (int64_t k = 0; k < z.size(); ++k) {
      const float shift = tensors[i].shift == nullptr ? 0.0f : draw ? z[k] : before[i][k];
      const double moved =
          double{params[i][k]} - shift + (tensors[i].direction ? 2.0 * directions[i][k] : 0.0);
      CHECK_NEAR(outs[i][k], moved, 1e-5);
    }
  }
}

}  // namespace

int check_keystreams(uint64_t seed, int threads) {
  Random random(seed);
  constexpr int kCases = 20;
  for (int i = 0; i < kCases; ++i) {
    const auto ks = random_keystream(random);
    const int64_t count = random.between(1, 9), first = random_first(random, count);
    Buffer<uint32_t> words(count * adaclip::kChunkWords, 0);
    adaclip::chacha20_chunks(ks, first, count, words.get());
    for (int64_t c = 0; c < count; ++c)
      for (int b = 0; b < adaclip::kChunkBlocks; ++b) {
        uint32_t block[adaclip::kBlockWords];
        adaclip::chacha20_block(ks, static_cast<uint32_t>((first + c) * adaclip::kChunkBlocks + b), block);
        for (int w = 0; w < adaclip::kBlockWords; ++w)
          CHECK(words[c * adaclip::kChunkWords + w * adaclip::kChunkBlocks + b] == block[w], "word %d", w);
      }

    const int64_t n = random.one_of<int64_t>({0, 1, 127, 128, 129, 5000, 70000});
    const double q = random.one_of({0.0, 1e-300, 0x1p-64, 1e-4, 0.3, 1 - 0x1p-53, 1.0});
    const auto taken = adaclip::bernoulli(ks, n, q, threads);
    std::vector<int64_t> exact;
    for (int64_t e = 0; e < n; ++e) {
      const int64_t chunk = e / adaclip::kChunkDraws, r = e % adaclip::kChunkDraws;
      uint32_t block[adaclip::kBlockWords];
      if (q < 1)
        adaclip::chacha20_block(ks, static_cast<uint32_t>(chunk * adaclip::kChunkBlocks + r % 16), block);
      const uint64_t draw = q < 1 ? uint64_t{block[2 * (r / 16)]} << 32 | block[2 * (r / 16) + 1] : 0;
      if (q >= 1 || draw < static_cast<uint64_t>(std::ldexp(q, 64))) exact.push_back(e);
    }
    CHECK(taken == exact, "%zu taken, %zu expected", taken.size(), exact.size());
  }
  return kCases;
}

int check_noise(uint64_t seed, int threads) {
  Random random(seed);
  constexpr int kCases = 20;
  for (int i = 0; i < kCases; ++i) {
    const auto ks = random_keystream(random);
    const int64_t n = random_size(random), first = random_first(random, chunks(n));
    Buffer<float> out(n), added(n, 1.0f);
    adaclip::normal_fill(ks, first, out.get(), n, 2.0f, false, threads);
    adaclip::normal_fill(ks, first, added.get(), n, 2.0f, true, threads);
    // Every chunk of a short fill; of a long one, the first and the last.
    for (int64_t c = 0; c < chunks(n); c += chunks(n) > 4 ? chunks(n) - 1 : 1) {
      const auto z = exact_normals(ks, first + c);
      for (int64_t k = c * kChunkNormals; k < std::min(n, (c + 1) * kChunkNormals); ++k) {
        CHECK_NEAR(out[k], 2 * z[k - c * kChunkNormals], 2 * 3e-7 * 9.3);
        CHECK_NEAR(added[k], 1 + double{out[k]}, 2e-6);
      }
    }
    check_step(random, threads);
    check_perturb(random, threads);
  }
  // Words that no search over keys would find: the ends of what they can be.
  for (uint32_t word : {0u, 1u, 0x7fffffffu, 0x80000000u, 0xffffffffu}) {
    Buffer<uint32_t> words(adaclip::kChunkWords, word);
    Buffer<float> z(kChunkNormals);
    adaclip::normals_of_words(words.get(), z.get());
    for (int64_t k = 0; k < kChunkNormals; ++k) CHECK(std::fabs(z[k]) < 9.4f, "%g", z[k]);
  }
  return kCases;
}

}  // namespace checks
