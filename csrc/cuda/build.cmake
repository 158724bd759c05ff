# The CUDA kernels: csrc/cuda is compiled into _core where ADACLIP_CUDA allows it. What came of it, and why, is
# compiled in as well: `adaclip doctor` says it.

set(ADACLIP_CUDA_ARCHITECTURES "" CACHE STRING
    "CMake's names of the architectures to compile for; empty: 80, 90, 100 and what comes after")

set(cuda_why_not "")
if(ADACLIP_CUDA STREQUAL "AUTO" OR ADACLIP_CUDA STREQUAL "ON")
  # Else CMake asks nvcc for its default, and compiles its tests for that; ours are chosen below.
  set(CMAKE_CUDA_ARCHITECTURES 80)
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)  # it was not found before, and may be there now
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    find_package(CUDAToolkit)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 11.8)
      set(cuda_why_not "nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 11.8")
    elseif(NOT TARGET CUDA::cudart_static)
      set(cuda_why_not "nvcc was found, and its libcudart_static was not")
    endif()
  else()
    set(cuda_why_not "nvcc was not found when it was built, or does not work with its C++ compiler")
  endif()
elseif(ADACLIP_CUDA STREQUAL "OFF")
  set(cuda_why_not "it was built with ADACLIP_CUDA=OFF")
else()
  message(FATAL_ERROR "ADACLIP_CUDA must be AUTO, ON or OFF, got '${ADACLIP_CUDA}'")
endif()

if(cuda_why_not AND ADACLIP_CUDA STREQUAL "ON")
  message(FATAL_ERROR "ADACLIP_CUDA=ON, but ${cuda_why_not}. Put nvcc on PATH or set CUDACXX to it; "
                      "ADACLIP_CUDA=AUTO builds without the CUDA kernels.")
endif()

if(cuda_why_not)
  message(STATUS "CUDA kernels: not built: ${cuda_why_not}")
  target_compile_definitions(_core PRIVATE "ADACLIP_CUDA_NOTE=\"${cuda_why_not}\"")
else()
  # Code for each of these, and PTX of the last, which later GPUs compile when they load it.
  set(cuda_architectures "${ADACLIP_CUDA_ARCHITECTURES}")
  if(NOT cuda_architectures)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
      set(cuda_architectures "80-real;90")
    else()
      set(cuda_architectures "80-real;90-real;100")
    endif()
  endif()
  message(STATUS "CUDA kernels: nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${cuda_architectures}")
  file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/cuda/*.cpp)
  # Objects of their own: the flags of the C++ core are not for nvcc.
  add_library(adaclip_cuda OBJECT ${cuda_sources})
  target_include_directories(adaclip_cuda PRIVATE csrc)
  target_link_libraries(adaclip_cuda PRIVATE CUDA::cudart_static)
  set_target_properties(adaclip_cuda PROPERTIES
    CUDA_ARCHITECTURES "${cuda_architectures}" CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
    CUDA_VISIBILITY_PRESET hidden)
  # One pass for each architecture, two at a time: most machines that build this have no more cores.
  target_compile_options(adaclip_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--threads=2>)
  # The runtime is linked statically and the driver is opened when it is first called: the module can be imported
  # on machines that have neither.
  target_link_libraries(_core PRIVATE adaclip_cuda CUDA::cudart_static)
  set_target_properties(_core PROPERTIES LINKER_LANGUAGE CXX CUDA_ARCHITECTURES "${cuda_architectures}")
  string(REPLACE ";" ", " cuda_text "${cuda_architectures}")
  string(REGEX REPLACE "([0-9])(-real)?(,|$)" ".\\1\\3" cuda_text "${cuda_text}")
  target_compile_definitions(_core PRIVATE
    ADACLIP_WITH_CUDA "ADACLIP_CUDA_NOTE=\"nvcc ${CMAKE_CUDA_COMPILER_VERSION}, for compute capability ${cuda_text} and later\"")
endif()
