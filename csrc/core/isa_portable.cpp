// The kernels of every *.inc, compiled for one instruction set (flags: CMakeLists.txt).
//
// Rule for code in *.inc: no inline function or template of the standard library. The linker keeps
// one copy of such a function for the whole module, and it may keep the AVX-512 one.
#define ADACLIP_ISA portable
#define ADACLIP_LANES 4  // 32-bit lanes of one register

// clang-format off: each file builds on those above it
#include "core/lanes.inc"

#include "core/chacha20.inc"
#include "core/normal.inc"
#include "core/noisy_step.inc"
#include "core/perturb.inc"
#include "core/tiles.inc"
#include "core/clip_and_sum.inc"
#include "core/conv_gram.inc"
#include "core/conv_instantiate.inc"
#include "core/conv_weighted_grad.inc"
#include "core/group_norm.inc"
// clang-format on
