#pragma once

/// Marks every function of the core.
///
/// Internal linkage is deliberate: the CPU kernels compile these headers once per instruction set,
/// and an ordinary `inline` function would leave the linker free to keep the AVX-512 copy for all.
/// Under nvcc the same function also runs on the device.
#if defined(__CUDACC__)
#define GRADKERN_FN __host__ __device__ static inline
#else
#define GRADKERN_FN static inline
#endif
