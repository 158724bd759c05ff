// Runs one CUDA thread block on the CPU, thread by thread: every thread is a fiber, which runs until it has
// to wait for its warp (matrix instructions, shuffles) or for its block (barriers). A kernel written against
// csrc/cuda/machine.cuh compiles against `Emulated` as it is.
//
// What it finds: wrong indices, layouts and schedules; threads of a warp that do not meet at the same
// instruction; deadlocks; misaligned or out-of-range 16-byte accesses; bank conflicts of matrix loads;
// missing waits and barriers, as far as they change results: the order of threads is random, shared memory
// starts as NaN, and asynchronous copies happen either when they are issued or not before they are waited
// for. What it cannot: how fast anything is, what the compiler makes of it, and how tensor cores round.
// Fragments are laid out as the PTX ISA says, and sums are rounded toward zero.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace emulation {

struct Range {
  const char* begin;
  const char* end;
  bool holds(const void* p, int bytes) const {
    const char* at = static_cast<const char*>(p);
    return at >= begin && at + bytes <= end;
  }
};

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

// Threads that wait for each other: a warp, or the block.
struct Meeting {
  int members = 0, arrived = 0, first = 0;
  const char* what = nullptr;
  std::vector<void*> arguments;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

class Block {
 public:
  static constexpr int kStack = 1 << 16;

  Block(int index, int threads, int shared_bytes, bool early, unsigned seed)
      : index(index),
        early_(early),
        random_(seed),
        shared_(shared_bytes + 128),
        fibers_(threads),
        warps_(threads / 32) {
    std::memset(shared_.data(), 0xff, shared_.size());
    shared = shared_.data() + (128 - reinterpret_cast<uintptr_t>(shared_.data()) % 128) % 128;
    shared_range = {shared, shared + shared_bytes};
    for (int w = 0; w < threads / 32; ++w) warps_[w] = {32, 0, 32 * w, nullptr, std::vector<void*>(32)};
    all_ = {threads, 0, 0, nullptr, std::vector<void*>(threads)};
  }

  // Runs `body` in every thread; empty, or what went wrong.
  std::string run(const std::function<void()>& body) {
    current = this;
    body_ = &body;
    for (size_t t = 0; t < fibers_.size(); ++t) {
      Fiber& fiber = fibers_[t];
      fiber.stack.reset(new char[kStack]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &main_;
      makecontext(&fiber.context, &Block::enter, 0);
      ready_.push_back(static_cast<int>(t));
    }
    while (!ready_.empty() && error_.empty()) {
      std::swap(ready_[random_() % ready_.size()], ready_.back());
      thread = ready_.back();
      ready_.pop_back();
      swapcontext(&main_, &fibers_[thread].context);
    }
    for (const Fiber& fiber : fibers_)
      if (!fiber.done && error_.empty()) error_ = "deadlock: a thread waits for one that has ended";
    return error_;
  }

  void fail(const std::string& why) {
    error_ = why + " (thread " + std::to_string(thread) + ")";
    swapcontext(&fibers_[thread].context, &main_);
  }

  // Waits for all members of the warp or block; the last to arrive runs `together` on everybody's argument.
  template <typename F>
  void meet(bool whole_block, const char* what, void* argument, F together) {
    Meeting& m = whole_block ? all_ : warps_[thread / 32];
    if (m.arrived > 0 && std::strcmp(m.what, what) != 0)
      fail(std::string("one thread is at ") + m.what + ", another at " + what);
    m.what = what;
    m.arguments[thread - m.first] = argument;
    if (++m.arrived < m.members) {
      swapcontext(&fibers_[thread].context, &main_);
      return;
    }
    together(m.arguments);
    m.arrived = 0;
    for (int i = 0; i < m.members; ++i)
      if (m.first + i != thread) ready_.push_back(m.first + i);
  }

  void issue(const Copy& copy) {
    if (reinterpret_cast<uintptr_t>(copy.to) % 16 != 0 || reinterpret_cast<uintptr_t>(copy.from) % 16 != 0)
      fail("a 16-byte copy is misaligned");
    if (!shared_range.holds(copy.to, 16)) fail("a copy goes outside of shared memory");
    bool inside = !copy.valid;
    for (const Range& range : global_ranges) inside = inside || range.holds(copy.from, 16);
    if (!inside) fail("a copy reads outside of the tensors");
    early_ ? perform(copy) : fibers_[thread].open.push_back(copy);
  }
  void commit() {
    fibers_[thread].groups.push_back(std::move(fibers_[thread].open));
    fibers_[thread].open.clear();
  }
  void wait(int pending) {
    auto& groups = fibers_[thread].groups;
    for (; static_cast<int>(groups.size()) > pending; groups.pop_front())
      for (const Copy& copy : groups.front()) perform(copy);
  }

  static Block* current;
  const int index;
  int thread = 0;
  char* shared;
  Range shared_range;
  std::vector<Range> global_ranges;

 private:
  static void enter() {
    (*current->body_)();
    current->fibers_[current->thread].done = true;
  }
  static void perform(const Copy& copy) {
    copy.valid ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
  }

  bool early_;
  std::mt19937 random_;
  std::vector<char> shared_;
  std::vector<Fiber> fibers_;
  std::vector<Meeting> warps_;
  Meeting all_;
  std::vector<int> ready_;
  const std::function<void()>* body_ = nullptr;
  ucontext_t main_;
  std::string error_;
};

inline Block* Block::current = nullptr;

inline float as_float(uint32_t v) {
  float f;
  std::memcpy(&f, &v, 4);
  return f;
}
inline uint32_t as_bits(float f) {
  uint32_t v;
  std::memcpy(&v, &f, 4);
  return v;
}
inline float from_bf16(uint16_t v) { return as_float(static_cast<uint32_t>(v) << 16); }
inline float from_fp16(uint16_t v) {
  const int exponent = v >> 10 & 31, fraction = v & 1023;
  const float sign = v & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? std::numeric_limits<float>::quiet_NaN() : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                               : std::ldexp(1024.0f + fraction, exponent - 25));
}
inline float toward_zero(double v) {
  const float f = static_cast<float>(v);
  return std::isfinite(v) && std::fabs(static_cast<double>(f)) > std::fabs(v) ? std::nextafter(f, 0.0f) : f;
}
inline float upward(long double v) {
  const float f = static_cast<float>(v);
  return f < v ? std::nextafter(f, INFINITY) : f;
}

struct Emulated {
  static int thread() { return Block::current->thread; }
  static int block() { return Block::current->index; }
  static int opaque(int v) { return v; }
  static void barrier() {
    Block::current->meet(true, "a barrier", nullptr, [](std::vector<void*>&) {});
  }
  static void copy16(void* to, const void* from, bool valid) { Block::current->issue({to, from, valid}); }
  static void commit() { Block::current->commit(); }
  static void wait(int pending) { Block::current->wait(pending); }

  static void load_matrices(uint32_t (&out)[4], const void* from) {
    struct Lane {
      uint32_t* out;
      const char* from;
    } lane{out, static_cast<const char*>(from)};
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) Block::current->fail("a matrix row is misaligned");
    if (!Block::current->shared_range.holds(from, 16))
      Block::current->fail("a matrix row is outside of shared memory");
    Block::current->meet(false, "a matrix load", &lane, [](std::vector<void*>& lanes) {
      // The eight rows of a matrix are read at once: 128 bytes, all from different banks.
      for (int m = 0; m < 4; ++m) {
        unsigned banks = 0;
        for (int row = 0; row < 8; ++row)
          banks |= 1u << (reinterpret_cast<uintptr_t>(static_cast<Lane*>(lanes[8 * m + row])->from) / 16 % 8);
        if (banks != 0xff) Block::current->fail("rows of a matrix lie in the same banks");
      }
      for (int l = 0; l < 32; ++l)
        for (int m = 0; m < 4; ++m)
          std::memcpy(&static_cast<Lane*>(lanes[l])->out[m],
                      static_cast<Lane*>(lanes[8 * m + l / 4])->from + l % 4 * 4, 4);
    });
  }

  static void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply(d, a, b0, b1, "a bf16 product", from_bf16);
  }
  static void multiply_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply(d, a, b0, b1, "an fp16 product", from_fp16);
  }
  static void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if (((a[0] | a[1] | a[2] | a[3] | b0 | b1) & 0x1fff) != 0) Block::current->fail("not a tf32 number");
    multiply(d, a, b0, b1, "a tf32 product", nullptr);
  }

  template <typename T>
  static T shuffle_xor(T v, int mask) {
    struct Lane {
      T in, out;
      int mask;
    } lane{v, v, mask};
    Block::current->meet(false, "a shuffle", &lane, [](std::vector<void*>& lanes) {
      for (int l = 0; l < 32; ++l) {
        Lane* own = static_cast<Lane*>(lanes[l]);
        own->out = static_cast<Lane*>(lanes[l ^ own->mask])->in;
      }
    });
    return lane.out;
  }

  static uint32_t bits(float v) { return as_bits(v); }
  static float value(uint32_t v) { return as_float(v); }
  static float fma_up(float a, float b, float c) { return upward(static_cast<long double>(a) * b + c); }
  static float add_up(float a, float b) { return upward(static_cast<long double>(a) + b); }
  static float sqrt_up(float a) { return upward(std::sqrt(static_cast<long double>(a))); }

 private:
  struct Product {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  };

  // narrow: what a 16-bit operand is; null for tf32.
  static void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* what,
                       float (*narrow)(uint16_t)) {
    Product own{d, a, {b0, b1}};
    Block::current->meet(false, what, &own, [narrow](std::vector<void*>& lanes) {
      // A register holds two columns of an operand, or one; the second half of the columns is two registers
      // on.
      const int per_word = narrow ? 2 : 1, k = 8 * per_word;
      static float left[16][16], right[8][16];
      auto element = [&](uint32_t word, int i) {
        return narrow ? narrow(static_cast<uint16_t>(word >> 16 * i)) : as_float(word);
      };
      for (int l = 0; l < 32; ++l) {
        const Product& p = *static_cast<Product*>(lanes[l]);
        for (int half = 0; half < 2; ++half)
          for (int i = 0; i < per_word; ++i) {
            const int column = (l % 4 + 4 * half) * per_word + i;
            left[l / 4][column] = element(p.a[2 * half], i);
            left[l / 4 + 8][column] = element(p.a[2 * half + 1], i);
            right[l / 4][column] = element(p.b[half], i);
          }
      }
      for (int l = 0; l < 32; ++l)
        for (int reg = 0; reg < 4; ++reg) {
          float& to = static_cast<Product*>(lanes[l])->d[reg];
          double sum = to;
          for (int c = 0; c < k; ++c)
            sum += static_cast<double>(left[l / 4 + 8 * (reg / 2)][c]) * right[l % 4 * 2 + reg % 2][c];
          to = toward_zero(sum);
        }
    });
  }
};

}  // namespace emulation
