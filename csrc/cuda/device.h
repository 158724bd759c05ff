// How functions of a kernel are declared, for nvcc and for a C++ compiler that runs them on the CPU.
#pragma once

#ifdef __CUDACC__
#define ADACLIP_DEVICE __device__ __forceinline__
#define ADACLIP_HOST_DEVICE __host__ __device__
#else
#define ADACLIP_DEVICE inline
#define ADACLIP_HOST_DEVICE
#endif
