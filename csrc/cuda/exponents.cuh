#pragma once

#include "elements.cuh"

/// How the magnitudes of elements are distributed, by powers of two.

namespace gradkern::cuda {

template <class T>
GRADKERN_DEVICE int column_of(T element) {
  using Bits = typename Element<T>::Bits;
  const Bits magnitude = bits_of(element) & static_cast<Bits>(~Bits{0}) >> 1;
  return exponent_column(magnitude, Element<T>::kFractionBits, Element<T>::kExponentBits);
}

GRADKERN_DEVICE uint32_t* shared_histograms() {
  __shared__ uint32_t histograms[kWarps * kExponentColumns];
  return histograms;
}

/// Integers are counted by atomics, whose order does not show: first in shared memory, one histogram per
/// warp so that warps do not wait for each other, then once per chunk and column in the result.
template <int kCapacity>
__global__ void __launch_bounds__(kBlock, kBlocksPerSm)
    exponents_kernel(const __grid_constant__ ExponentsArgs args,
                     const __grid_constant__ Addresses<kCapacity> grads) {
  uint32_t* const histograms = shared_histograms();
  uint32_t* const mine = histograms + threadIdx.x / kWarp * kExponentColumns;
  const Chunk chunk = args.plan.chunks[blockIdx.x];
  for (int c = threadIdx.x; c < kWarps * kExponentColumns; c += kBlock) histograms[c] = 0;
  __syncthreads();

  with_type(args.plan.tensors[chunk.tensor].dtype, grads.data[chunk.tensor], chunk.offset, [&](auto* data) {
    using T = std::remove_pointer_t<decltype(data)>;
    for_each(
        data, chunk.length, block_team(), [&](T* element) { atomicAdd(&mine[column_of(*element)], 1u); },
        [&](const Batch& batch) {
#pragma unroll
          for (int k = 0; k < kLoads; ++k) {
            if (k >= batch.count) break;
            const Vector<T> vector = elements<T>(batch.vector[k]);
#pragma unroll
            for (int e = 0; e < kWidth<T>; ++e) atomicAdd(&mine[column_of(vector.element[e])], 1u);
          }
        });
  });
  __syncthreads();

  if (threadIdx.x < kExponentColumns) {
    unsigned long long count = 0;
    for (int warp = 0; warp < kWarps; ++warp) count += histograms[warp * kExponentColumns + threadIdx.x];
    int64_t* const counts = args.counts + int64_t{chunk.tensor} * kExponentColumns;
    if (count) atomicAdd(reinterpret_cast<unsigned long long*>(&counts[threadIdx.x]), count);
  }
}

}  // namespace gradkern::cuda
