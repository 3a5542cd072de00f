#pragma once

#include "stats.cuh"

/// Units: the slices of a tensor along dim 0, see core/plan.h.

namespace gradkern::cuda {

/// Calls `work(unit, begin, length, team)` for every unit of a chunk, or for the piece of a unit that it is;
/// `begin` counts from the chunk's first element. Where there are enough of them each warp takes its own,
/// else the whole block takes one after the other; either way `work` finds its team complete.
template <class Work>
GRADKERN_DEVICE void for_each_unit(const Chunk& chunk, int64_t unit_numel, Work work) {
  const int64_t first = chunk.offset / unit_numel;
  const int whole = static_cast<int>(chunk.length / unit_numel);
  const int units = whole > 0 ? whole : 1;
  const int length = chunk.length / units;
  const bool by_warp = units >= kWarps;
  const Team team = by_warp ? warp_team() : block_team();
  const int step = by_warp ? kWarps : 1;
  for (int unit = by_warp ? threadIdx.x / kWarp : 0; unit < units; unit += step) {
    work(first + unit, unit * length, length, team);
  }
}

template <int kCapacity>
__global__ void __launch_bounds__(kBlock, kBlocksPerSm)
    unit_sums_kernel(const __grid_constant__ UnitSumsArgs args,
                     const __grid_constant__ Addresses<kCapacity> tensors) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Chunk chunk = args.plan.chunks[blockIdx.x];
  const TensorPlan& shape = args.plan.tensors[chunk.tensor];
  double* const sum_sq = args.sum_sq + shape.first_unit;
  const int64_t pieces = chunk_count(shape.unit_numel);

  for_each_unit(chunk, shape.unit_numel, [&](int64_t unit, int begin, int length, Team team) {
    double sum = 0;
    with_type(shape.dtype, tensors.data[chunk.tensor], chunk.offset + begin, [&](auto* data) {
      Tally<std::remove_pointer_t<decltype(data)>> tally;
      for_each(
          data, length, team, [&](auto* element) { add_one(tally, *element); },
          [&](const Batch& batch) { add_batch(tally, batch); });
      sum = tally.sum_sq;
    });
    sum = team.size == kWarp ? warp_sum(sum) : block_sum(sum);
    if (team.rank == 0) (pieces == 1 ? sum_sq[unit] : args.partials[blockIdx.x]) = sum;
  });

  if (pieces == 1 || !last_to_arrive(&args.tickets[chunk.tensor], shape.chunk_count)) return;
  const double* const partials = args.partials + shape.first_chunk;
  for (int64_t unit = warp; unit < shape.chunk_count / pieces; unit += kWarps) {
    double sum = 0;
    for (int64_t piece = lane; piece < pieces; piece += kWarp) sum += partials[unit * pieces + piece];
    sum = warp_sum(sum);
    if (lane == 0) sum_sq[unit] = sum;
  }
}

}  // namespace gradkern::cuda
