#pragma once

#include "units.cuh"

/// Clipping by coefficients that the device holds.

namespace gradkern::cuda {

/// The action on a tensor; under `CoefScope::kUnit`, on the unit of that number among all units.
GRADKERN_DEVICE Action action_for(const ApplyArgs& args, int tensor, int64_t unit) {
  const int64_t index = args.scope == CoefScope::kGlobal   ? 0
                        : args.scope == CoefScope::kTensor ? tensor
                                                           : unit;
  return {args.coef[index], args.bounds[static_cast<int>(args.plan.tensors[tensor].dtype)], args.nonfinite};
}

/// What is known of a tensor; without rows, that it may hold anything.
GRADKERN_DEVICE Stats known_stats(const ApplyArgs& args, int tensor) {
  return args.rows ? args.rows[tensor] : Stats{INFINITY, INFINITY, 1, 1, 0};
}

/// Whether any tensor changes; the same in every thread. Coefficients of units, which can be many, are
/// looked at where their units are.
GRADKERN_DEVICE bool anything_changes(const ApplyArgs& args) {
  if (args.scope == CoefScope::kUnit) return true;
  // The common case needs one number: with a coefficient of 1 for all only a bound or a word can change
  // anything, and no row has to be looked at.
  if (args.scope == CoefScope::kGlobal && args.coef[0] == 1 && args.nonfinite != NonFinite::kZero) {
    bool bounded = false;
    for (const double bound : args.bounds) bounded = bounded || bound < INFINITY;
    if (!bounded) return false;
  }
  bool mine = false;
  for (int t = threadIdx.x; t < args.plan.tensor_count; t += kBlock) {
    mine = mine || changes(action_for(args, t, 0), known_stats(args, t));
  }
  return __syncthreads_or(mine);
}

template <Scale kScale, class T>
GRADKERN_DEVICE void scale_range(T* data, int length, Team team, const Action& action) {
  const Real<T> bound = static_cast<Real<T>>(action.bound);
  const ScaleAndClamp<T, kScale> clip{action.coef, bound, narrow<T>(bound), narrow<T>(-bound),
                                      action.nonfinite};
  for_each(
      data, length, team, [&](T* element) { rewrite_one(element, clip); },
      [&](const Batch& batch) { rewrite<T>(batch, clip); });
}

/// Chooses how the product is computed, as the CPU kernels do.
template <class T>
GRADKERN_DEVICE void clip_range(T* data, int length, Team team, const Action& action) {
  const bool subnormal = static_cast<float>(action.coef) < 0x1p-126f && action.coef != 0;
  if constexpr (sizeof(T) == 8) {
    scale_range<Scale::kReal>(data, length, team, action);
  } else if (sizeof(T) == 4 || subnormal) {
    scale_range<Scale::kDouble>(data, length, team, action);
  } else {
    scale_range<Scale::kReal>(data, length, team, action);
  }
}

template <int kCapacity>
__global__ void __launch_bounds__(kBlock, kBlocksPerSm)
    apply_kernel(const __grid_constant__ ApplyArgs args, const __grid_constant__ Addresses<kCapacity> grads) {
  if (!anything_changes(args)) return;
  for (uint32_t i = blockIdx.x; i < args.plan.chunk_count; i += gridDim.x) {
    const Chunk chunk = args.plan.chunks[args.plan.chunk_count - 1 - i];
    const TensorPlan& shape = args.plan.tensors[chunk.tensor];
    const int64_t unit_numel = args.scope == CoefScope::kUnit ? shape.unit_numel : chunk.length;
    for_each_unit(chunk, unit_numel, [&](int64_t unit, int begin, int length, Team team) {
      const Action action = action_for(args, chunk.tensor, shape.first_unit + unit);
      if (!changes(action, known_stats(args, chunk.tensor))) return;
      with_type(shape.dtype, grads.data[chunk.tensor], chunk.offset + begin,
                [&](auto* data) { clip_range(data, length, team, action); });
    });
  }
}

}  // namespace gradkern::cuda
