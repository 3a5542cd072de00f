#pragma once

#include "kernels.h"

/// What the threads of a block do together. Shared memory is declared in these functions, none of which
/// is a template: compiled as plain C++, a shared array of a template would be an ordinary static one.

#define GRADKERN_DEVICE __device__ static inline

namespace gradkern::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

/// The sum over the 32 lanes of a warp, the same bits in each of them.
GRADKERN_DEVICE double warp_sum(double mine) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    mine += __shfl_xor_sync(kAllLanes, mine, distance);
  }
  return mine;
}

/// The sum over the block, the same bits in every thread.
GRADKERN_DEVICE double block_sum(double mine) {
  __shared__ double slots[kWarps];
  mine = warp_sum(mine);
  if (threadIdx.x % kWarp == 0) slots[threadIdx.x / kWarp] = mine;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += slots[warp];
  __syncthreads();  // the slots may be written again
  return sum;
}

GRADKERN_DEVICE Stats shuffle_down(const Stats& mine, int distance) {
  Stats other;
  other.sum_sq = __shfl_down_sync(kAllLanes, mine.sum_sq, distance);
  other.abs_max = __shfl_down_sync(kAllLanes, mine.abs_max, distance);
  other.nan_count = __shfl_down_sync(kAllLanes, mine.nan_count, distance);
  other.inf_count = __shfl_down_sync(kAllLanes, mine.inf_count, distance);
  other.zero_count = __shfl_down_sync(kAllLanes, mine.zero_count, distance);
  return other;
}

/// Merges the `Stats` of all threads of the block. The result is valid in thread 0 only. Two calls need a
/// barrier between them.
///
/// A tree, most of it in shared memory: shuffles in every warp would make three times as many merges, and
/// additions of doubles are what consumer GPUs do slowest.
GRADKERN_DEVICE Stats block_merge(Stats mine) {
  // Bytes, because shared memory cannot be initialised, as the members of `Stats` would be.
  alignas(Stats) __shared__ unsigned char bytes[kBlock * sizeof(Stats)];
  Stats* const slots = reinterpret_cast<Stats*>(bytes);
  const int thread = threadIdx.x;
  slots[thread] = mine;
  for (int half = kBlock / 2; half >= kWarp; half /= 2) {
    __syncthreads();
    if (thread < half) slots[thread] = merge(slots[thread], slots[thread + half]);
  }
  if (thread < kWarp) {
    mine = slots[thread];
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      mine = merge(mine, shuffle_down(mine, distance));
    }
  }
  return mine;
}

/// Merges `count` records in device memory, thread by thread every `kBlock`-th: in an order given by `count`
/// alone. Valid in thread 0 only.
GRADKERN_DEVICE Stats block_fold(const Stats* parts, int count) {
  Stats mine;
  for (int i = threadIdx.x; i < count; i += kBlock) mine = merge(mine, parts[i]);
  return block_merge(mine);
}

/// Whether this block is the last of `count` to take a ticket. What thread 0 of each of them (or all of
/// its threads, if a barrier came after) wrote before is then visible to every thread of the last one.
///
/// The first fence orders those writes before the ticket, the second orders the ticket before the reads
/// and drops what the SM's cache held of them; the barrier extends both to the block. The last ticket
/// wraps the counter to zero, ready for the next launch. Two calls need a barrier between them.
GRADKERN_DEVICE bool last_to_arrive(uint32_t* tickets, int count) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    const uint32_t before = atomicInc(tickets, static_cast<uint32_t>(count) - 1);
    last = before == static_cast<uint32_t>(count) - 1;
    if (last) __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace gradkern::cuda
