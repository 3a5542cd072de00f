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

inline uint4 __ldcg(const uint4* address) { return *address; }
inline void __stcg(uint4* address, uint4 value) { *address = value; }

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
