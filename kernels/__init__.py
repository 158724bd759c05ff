"""Triton kernels, one operation per file; installed as `adaclip.kernels`.

A module holds `@triton.jit` code and one launcher that takes tensors of one device and trusts its arguments:
`adaclip.ops` is where they are checked. Importing a module compiles nothing and needs no GPU, but does need
triton, so only `adaclip.backends.triton` imports it, when a kernel is asked for.

With TRITON_INTERPRET=1 set before triton is imported the launchers take tensors on the CPU. Every module ends
with `aot()`: what `adaclip.kernels.aot` compiles, on any machine, to see that it compiles and what it needs.
"""
