// What the checks of the core under sanitizers share: inputs in buffers that end where they say, and
// comparisons that stop the program.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace checks {

// n elements on the heap, allocated by themselves: the address sanitizer knows both ends. Outputs start as
// NaN.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n, T fill = std::numeric_limits<T>::quiet_NaN()) : n_(n), data_(new T[n]) {
    for (int64_t i = 0; i < n; ++i) data_[i] = fill;
  }
  Buffer(const Buffer& other) : n_(other.n_), data_(new T[other.n_]) {
    for (int64_t i = 0; i < n_; ++i) data_[i] = other.data_[i];
  }
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { delete[] data_; }
  // An empty tensor of torch has no address.
  T* get() { return n_ == 0 ? nullptr : data_; }
  const T* get() const { return n_ == 0 ? nullptr : data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return n_; }
  bool same_bits(const Buffer& other) const {
    return n_ == other.n_ && std::memcmp(data_, other.data_, n_ * sizeof(T)) == 0;
  }

 private:
  int64_t n_;
  T* data_;
};

struct Random {
  std::mt19937_64 engine;
  explicit Random(uint64_t seed) : engine(seed) {}
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(engine() % static_cast<uint64_t>(high - low + 1));
  }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[between(0, static_cast<int64_t>(values.size()) - 1)];
  }
  double uniform() { return static_cast<double>(engine() >> 11) * 0x1p-53; }
  Buffer<float> floats(int64_t n) {
    Buffer<float> out(n);
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(4 * uniform() - 2);
    return out;
  }
  float bad() {
    return one_of({std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                   -std::numeric_limits<float>::infinity()});
  }
};

#define CHECK(ok, ...)                                              \
  do {                                                              \
    if (!(ok)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #ok); \
      std::fprintf(stderr, __VA_ARGS__);                            \
      std::fprintf(stderr, "\n");                                   \
      std::abort();                                                 \
    }                                                               \
  } while (0)

#define CHECK_NEAR(got, want, slack)                                                                  \
  do {                                                                                                \
    const double got_ = (got), want_ = (want), slack_ = (slack);                                      \
    CHECK(std::fabs(got_ - want_) <= slack_, "got %.9g, want %.9g within %.3g", got_, want_, slack_); \
  } while (0)

// Each runs one family of kernels on random cases from this seed, with that many threads, at the
// instruction set in use, and returns how many cases that were.
int check_convolutions(uint64_t seed, int threads);
int check_linears(uint64_t seed, int threads);
int check_group_norms(uint64_t seed, int threads);
int check_rows(uint64_t seed, int threads);
int check_clipping(uint64_t seed, int threads);
int check_keystreams(uint64_t seed, int threads);
int check_noise(uint64_t seed, int threads);

}  // namespace checks
