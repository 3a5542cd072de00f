#pragma once

#include "clip.cuh"

/// A penalty on the size of weights, and its gradient, in one pass.

namespace gradkern::cuda {

/// The weights of a batch of gradients. Gradients are aligned here, their weights perhaps otherwise (views
/// into buffers of different offsets): those are loaded one by one.
template <class T>
GRADKERN_DEVICE void load_weights(uint4 (&loaded)[kLoads], const T* weights, const Batch& batch) {
  const bool aligned = reinterpret_cast<uintptr_t>(weights) % 16 == 0;
  const uint4* const vectors = reinterpret_cast<const uint4*>(weights);
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
    const bool inside = aligned && k < batch.count;
    loaded[k] = inside ? load(vectors + k * batch.stride) : uint4{0, 0, 0, 0};
  }
  if (aligned) return;
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
    if (k >= batch.count) break;
    Vector<T> vector;
#pragma unroll
    for (int e = 0; e < kWidth<T>; ++e) vector.element[e] = weights[k * batch.stride * kWidth<T> + e];
    loaded[k] = raw(vector);
  }
}

/// The penalty of a weight is added to `sum`, its gradient to the gradient that is returned.
template <class T>
GRADKERN_DEVICE T penalised(T grad, T weight, double l1, double l2, double& sum) {
  const double w = static_cast<double>(real(weight));
  const double sign = w > 0 ? 1 : w < 0 ? -1 : w;  // of a zero or a NaN, itself
  sum += l1 * fabs(w) + l2 * (w * w);
  const double added = l1 * sign + 2 * l2 * w;
  return narrow<T>(static_cast<Real<T>>(static_cast<double>(real(grad)) + added));
}

/// Half the blocks of the other kernels, since each thread has twice as many loads in flight.
constexpr int kPenaltyBlocksPerSm = kBlocksPerSm / 2;

template <int kCapacity>
__global__ void __launch_bounds__(kBlock, kPenaltyBlocksPerSm)
    penalty_kernel(const __grid_constant__ PenaltyArgs args,
                   const __grid_constant__ Addresses<kCapacity> addresses) {
  const Chunk chunk = args.plan.chunks[blockIdx.x];
  const TensorPlan& shape = args.plan.tensors[chunk.tensor];
  double sum = 0;
  with_type(shape.dtype, addresses.data[chunk.tensor], chunk.offset, [&](auto* grads) {
    using T = std::remove_pointer_t<decltype(grads)>;
    const T* const weights =
        static_cast<const T*>(addresses.data[args.plan.tensor_count + chunk.tensor]) + chunk.offset;
    for_each(
        grads, chunk.length, block_team(),
        [&](T* grad) { *grad = penalised(*grad, weights[grad - grads], args.l1, args.l2, sum); },
        [&](const Batch& batch) {
          uint4 loaded[kLoads];
          load_weights(loaded, weights + (reinterpret_cast<const T*>(batch.at) - grads), batch);
#pragma unroll
          for (int k = 0; k < kLoads; ++k) {
            if (k >= batch.count) break;
            Vector<T> vector = elements<T>(batch.vector[k]);
            const Vector<T> weight = elements<T>(loaded[k]);
#pragma unroll
            for (int e = 0; e < kWidth<T>; ++e) {
              vector.element[e] = penalised(vector.element[e], weight.element[e], args.l1, args.l2, sum);
            }
            store(batch.at + k * batch.stride, raw(vector));
          }
        });
  });

  sum = block_sum(sum);
  if (shape.chunk_count > 1) {
    if (threadIdx.x == 0) args.partials[blockIdx.x] = sum;
    if (!last_to_arrive(&args.tickets[chunk.tensor], shape.chunk_count)) return;
    sum = 0;
    for (int k = threadIdx.x; k < shape.chunk_count; k += kBlock) sum += args.partials[shape.first_chunk + k];
    sum = block_sum(sum);
  }
  if (threadIdx.x == 0) args.values[chunk.tensor] = sum;
}

}  // namespace gradkern::cuda
