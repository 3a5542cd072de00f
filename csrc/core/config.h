#pragma once

/// Marks every function of the core.
///
/// Internal linkage is deliberate: the CPU kernels compile these headers once per instruction set,
/// and an ordinary `inline` function would leave the linker free to keep the AVX-512 copy for all.
/// Member functions cannot be static in that sense, so they are always inlined.
/// Under nvcc the same function also runs on the device.
#if defined(__CUDACC__)
#define GRADKERN_FN __host__ __device__ static inline
#define GRADKERN_MEMBER __host__ __device__ inline
#elif defined(__GNUC__)
#define GRADKERN_FN static inline
#define GRADKERN_MEMBER __attribute__((always_inline)) inline
#else
#define GRADKERN_FN static inline
#define GRADKERN_MEMBER inline
#endif
