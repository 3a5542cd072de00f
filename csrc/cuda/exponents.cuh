#pragma once

#include "elements.cuh"

/// How the magnitudes of elements are distributed, by powers of two.

namespace gradkern::cuda {

/// The column that counts an element, from the bits of its exponent.
template <class T>
GRADKERN_DEVICE int exponent_column(T element) {
  using Bits = typename Element<T>::Bits;
  constexpr int kFractionBits = Element<T>::kFractionBits;
  constexpr int kLargest = (1 << Element<T>::kExponentBits) - 1;
  const Bits bits = bits_of(element);
  const int biased = static_cast<int>(bits >> kFractionBits) & kLargest;
  if (biased == 0) return static_cast<Bits>(bits << 1) == 0 ? kZeroColumn : kSubnormalColumn;
  if (biased == kLargest) return kNonFiniteColumn;
  const int exponent = biased - kLargest / 2;
  const int from_first = min(max(exponent, kFirstExponent), kLastExponent) - kFirstExponent;
  return kFirstExponentColumn + from_first;
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
  for (int64_t i = blockIdx.x; i < args.plan.chunk_count; i += gridDim.x) {
    const Chunk chunk = args.plan.chunks[i];
    for (int c = threadIdx.x; c < kWarps * kExponentColumns; c += kBlock) histograms[c] = 0;
    __syncthreads();

    with_type(args.plan.tensors[chunk.tensor].dtype, grads.data[chunk.tensor], chunk.offset, [&](auto* data) {
      using T = std::remove_pointer_t<decltype(data)>;
      for_each(
          data, chunk.length, block_team(), [&](T* element) { atomicAdd(&mine[exponent_column(*element)], 1u); },
          [&](const Batch& batch) {
#pragma unroll
            for (int k = 0; k < kLoads; ++k) {
              if (k >= batch.count) break;
              const Vector<T> vector = elements<T>(batch.vector[k]);
#pragma unroll
              for (int e = 0; e < kWidth<T>; ++e) atomicAdd(&mine[exponent_column(vector.element[e])], 1u);
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
    __syncthreads();  // the histograms may be cleared
  }
}

}  // namespace gradkern::cuda
