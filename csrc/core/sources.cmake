# The sources of the core and what they are compiled with: for the module, and for the sanitizer builds of it.

file(GLOB core_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.cpp)
# No contraction: a fused multiply-add on one instruction set and not on another would make the
# same key give different bits. Kernels that want an FMA ask for it.
set(core_options -Wall -Wextra -ffp-contract=off -fno-math-errno -fno-trapping-math)

# One source, three instruction sets: every isa_<level>.cpp includes the same kernels in its own
# namespace, and simd.cpp picks one at run time, so that one wheel runs on any x86-64.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/isa_avx512.cpp PROPERTIES COMPILE_OPTIONS
    "-mavx512f;-mavx512dq;-mavx512bw;-mavx512vl;-mavx512cd;-mavx2;-mfma;-mprefer-vector-width=512")
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/isa_avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma")
endif()
