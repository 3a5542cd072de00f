#pragma once

#include "clip.cuh"

/// Measuring, alone and together with clipping by value.

namespace gradkern::cuda {

/// Squares that are summed in float32 before the sum is widened, for halves; float32 has half as many.
constexpr int kShortSum = kLoads * kWidth<BFloat16>;
static_assert(kShortSum <= 32, "the error bound below");

/// Below this a short float32 sum is redone in double: squares this small may have lost bits, or vanished.
template <class T>
constexpr Real<T> kSmallestSum = 0x1p-118f;
template <>
constexpr double kSmallestSum<double> = 0;

/// What one thread has seen of a chunk.
///
/// How far off the norm can be, u = 2^-24: a short sum adds the squares of each of `kLoads` vectors by a
/// chain of at most 8 fused multiply-adds, then the four chains pairwise, 10 roundings on the way of any
/// square. All terms are positive, so the sum is off by at most 10u/(1 - 10u) < 6.0e-7 of itself. Squares
/// in the subnormal range are off by up to 2^-150 more, each, together under 2^-145: 2^-27 of a sum not
/// below `kSmallestSum`. A sum that is smaller, or overflows, or meets a NaN, is taken in double, where
/// squares are exact. Adding short sums in double, tree included, costs less than 1e-12. So sum_sq is within
/// 6.1e-7 and its root, the norm, within 3.1e-7, for any input. Had all 32 additions been one chain it
/// would be 9.6e-7.
template <class T>
struct Tally {
  double sum_sq = 0;
  Real<T> abs_max = 0;
  uint32_t nan_count = 0;
  uint32_t inf_count = 0;
  uint32_t zero_count = 0;
};

template <class T>
GRADKERN_DEVICE Stats stats_of(const Tally<T>& tally) {
  Stats stats;
  stats.sum_sq = tally.sum_sq;
  stats.abs_max = tally.abs_max;
  stats.nan_count = tally.nan_count;
  stats.inf_count = tally.inf_count;
  stats.zero_count = tally.zero_count;
  return stats;
}

/// Adds one element, in double; its zero count aside, which `add_batch` has taken by then.
template <class T>
GRADKERN_DEVICE void add_exactly(Tally<T>& tally, T element) {
  const Real<T> x = real(element);
  if (finite(x)) {
    tally.sum_sq = fma(static_cast<double>(x), static_cast<double>(x), tally.sum_sq);
    tally.abs_max = fmax(tally.abs_max, fabs(x));
  } else if (x != x) {
    ++tally.nan_count;
  } else {
    ++tally.inf_count;
  }
}

template <class T>
GRADKERN_DEVICE void add_one(Tally<T>& tally, T element) {
  add_exactly(tally, element);
  tally.zero_count += real(element) == 0;
}

/// Returns a magnitude that no element of the batch exceeds, Inf if there may be a NaN or an Inf.
template <class T>
GRADKERN_DEVICE Real<T> add_batch(Tally<T>& tally, const Batch& batch) {
  Real<T> sums[kLoads] = {};
  Real<T> largest = 0;  // fmax passes over NaN
  float zeros = 0;      // exact, and an instruction less per element than an integer
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
    const Vector<T> vector = elements<T>(batch.vector[k]);
#pragma unroll
    for (int e = 0; e < kWidth<T>; ++e) {
      const Real<T> x = real(vector.element[e]);
      sums[k] = fma(x, x, sums[k]);
      largest = fmax(largest, fabs(x));
      zeros += x == 0 ? 1.0f : 0.0f;
    }
  }
  const int padding = (kLoads - batch.count) * kWidth<T>;  // the zeros beyond the end
  tally.zero_count += static_cast<uint32_t>(zeros) - padding;
  const Real<T> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  if (sum >= kSmallestSum<T> && finite(sum)) {
    tally.sum_sq += sum;
    tally.abs_max = fmax(tally.abs_max, largest);
  } else if (!(sum == 0 && largest == 0)) {
    // Rare, and read again so that the batch need not be kept in registers for it.
#pragma unroll 1
    for (int k = 0; k < batch.count; ++k) {
      const Vector<T> vector = elements<T>(load(batch.at + k * batch.stride));
#pragma unroll
      for (int e = 0; e < kWidth<T>; ++e) add_exactly(tally, vector.element[e]);
    }
  }
  return finite(sum) ? largest : static_cast<Real<T>>(INFINITY);
}

/// Writes the total and what follows from it. For one block, when all rows are there.
GRADKERN_DEVICE void finish_total(const Plan& plan, const Finish& finish) {
  if (plan.filled_count < plan.tensor_count) {
    // Every thread writes those that it will fold itself.
    for (int t = threadIdx.x; t < plan.tensor_count; t += kBlock) {
      if (plan.tensors[t].chunk_count == 0) finish.rows[t] = Stats{};
    }
  }
  const Stats total = block_fold(finish.rows, plan.tensor_count);
  if (threadIdx.x != 0) return;
  const double max_norm = finish.limit ? *finish.limit : finish.max_norm;
  const double coef = clip_coef(total, max_norm, finish.eps, finish.nonfinite);
  if (finish.total) *finish.total = total;
  if (finish.norm) *finish.norm = torch_norm(total);
  if (finish.coef) *finish.coef = coef;
  if (finish.found_inf) *finish.found_inf = all_finite(total) ? 0.0f : 1.0f;
  if (finish.grad_scale) *finish.grad_scale = static_cast<float>(1 / coef);
}

/// Takes in the statistics of the block's chunk (valid in thread 0); the last block of a tensor folds its
/// row, the last of all the total.
GRADKERN_DEVICE void finish_chunk(const Plan& plan, const Workspace& workspace, const Finish& finish,
                                  int tensor, Stats partial) {
  const TensorPlan& shape = plan.tensors[tensor];
  Stats row = partial;
  if (shape.chunk_count > 1) {
    if (threadIdx.x == 0) workspace.partials[blockIdx.x] = partial;
    if (!last_to_arrive(&workspace.tickets[tensor], shape.chunk_count)) return;
    row = block_fold(workspace.partials + shape.first_chunk, shape.chunk_count);
  }
  if (threadIdx.x == 0) finish.rows[tensor] = row;
  if (!last_to_arrive(&workspace.tickets[plan.tensor_count], plan.filled_count)) return;
  finish_total(plan, finish);
}

template <int kCapacity>
__global__ void __launch_bounds__(kBlock, kBlocksPerSm)
    stats_kernel(const __grid_constant__ StatsArgs args, const __grid_constant__ Addresses<kCapacity> grads) {
  if (args.plan.chunk_count == 0) return finish_total(args.plan, args.finish);
  const Chunk chunk = args.plan.chunks[blockIdx.x];
  Stats mine;
  with_type(args.plan.tensors[chunk.tensor].dtype, grads.data[chunk.tensor], chunk.offset, [&](auto* data) {
    Tally<std::remove_pointer_t<decltype(data)>> tally;
    for_each(
        data, chunk.length, block_team(), [&](auto* element) { add_one(tally, *element); },
        [&](const Batch& batch) { add_batch(tally, batch); });
    mine = stats_of(tally);
  });
  finish_chunk(args.plan, args.workspace, args.finish, chunk.tensor, block_merge(mine));
}

/// A block less than the other kernels: threads hold their loads until they know whether to write them.
constexpr int kValueBlocksPerSm = kBlocksPerSm - 1;

template <int kCapacity>
__global__ void __launch_bounds__(kBlock, kValueBlocksPerSm)
    value_kernel(const __grid_constant__ ValueArgs args, const __grid_constant__ Addresses<kCapacity> grads) {
  if (args.plan.chunk_count == 0) return finish_total(args.plan, args.finish);
  const Chunk chunk = args.plan.chunks[blockIdx.x];
  const DType dtype = args.plan.tensors[chunk.tensor].dtype;
  Stats mine;
  with_type(dtype, grads.data[chunk.tensor], chunk.offset, [&](auto* data) {
    using T = std::remove_pointer_t<decltype(data)>;
    const Real<T> bound = static_cast<Real<T>>(args.bounds[static_cast<int>(dtype)]);
    const Clamp<T> clamp{bits_of(narrow<T>(bound)), args.finish.nonfinite};
    Tally<T> tally;
    for_each(
        data, chunk.length, block_team(),
        [&](T* element) {
          add_one(tally, *element);
          rewrite_one(element, clamp);
        },
        [&](const Batch& batch) {
          const Real<T> largest = add_batch(tally, batch);
          if (largest > bound || !finite(largest)) rewrite<T>(batch, clamp);
        });
    mine = stats_of(tally);
  });
  finish_chunk(args.plan, args.workspace, args.finish, chunk.tensor, block_merge(mine));
}

}  // namespace gradkern::cuda
