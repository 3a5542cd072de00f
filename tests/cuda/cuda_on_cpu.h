#pragma once

// The words of CUDA C++ that the kernels use, for a compiler of plain C++: included before their sources,
// which stay as they are. What the words do is in executor.h.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "executor.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
// Every block has its own copy: the executor exchanges the contents of this section when it turns to another.
#define __shared__ static __attribute__((section("shared_memory")))

#define threadIdx (executor::current_thread().thread)
#define blockIdx (executor::current_thread().block)
#define gridDim (executor::current_thread().grid)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

#define __syncthreads() executor::barrier(false)
#define __syncthreads_or(predicate) executor::barrier(predicate)
#define __threadfence() executor::fence()

// Checked as the one access that they are on a GPU.
__attribute__((noinline, no_sanitize_thread)) inline uint4 __ldcg(const uint4* address) {
  executor::plain_access(address, sizeof *address, false);
  return *address;
}
__attribute__((noinline, no_sanitize_thread)) inline void __stcg(uint4* address, uint4 value) {
  executor::plain_access(address, sizeof *address, true);
  *address = value;
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  return executor::shuffle(mask, value, executor::lane() + distance);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return executor::shuffle(mask, value, executor::lane() ^ bits);
}

template <class T>
T atomicAdd(T* address, T value) {
  return executor::atomic(address, [=](T old) { return old + value; });
}
inline uint32_t atomicInc(uint32_t* address, uint32_t limit) {
  return executor::atomic(address, [=](uint32_t old) { return old >= limit ? 0 : old + 1; });
}
