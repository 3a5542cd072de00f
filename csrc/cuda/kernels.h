#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/clip.h"
#include "../core/exponents.h"
#include "../core/plan.h"
#include "../core/span.h"
#include "../core/stats.h"

/// What the CUDA kernels are given and what they leave behind. Plain C++: the launching code includes
/// this header without nvcc, and gets the kernels by `kernel_handle`.
///
/// How one launch measures everything
///
///   - A block reads a chunk, whichever tensor and dtype that is, and stores its `Stats` as a partial.
///   - The block that arrives last at its tensor's ticket folds the partials of the tensor to a row.
///   - The block that arrives last at the common ticket folds the rows to the total, and from it writes
///     the norm, the clip coefficient, `found_inf` and `grad_scale`.
///
/// The last block does it rather than a second kernel because the rows are then folded while other
/// tensors are still being read, and because a second launch costs more than the whole measuring of a
/// small model. Which block is last depends on the schedule; what it computes does not: partials and
/// rows are merged in an order fixed by the plan alone, and no floating-point value is ever accumulated
/// by an atomic. So the same gradients give the same bits on any grid and any GPU.
///
/// Nothing is read back by the host. What depends on the numbers (apply) reads them on the device.

namespace gradkern::cuda {

/// Threads of every block, and blocks that an SM is to hold: 1024 threads, of at most 64 registers each, on
/// every architecture from sm_75. With four 16-byte loads in flight per thread that is 64 KiB an SM. Latency
/// times bandwidth asks for 45 KiB on the fastest GPU we know of (0.8 us, 8 TB/s, 148 SMs); two kernels that
/// need more registers settle for fewer blocks, and stay above that.
constexpr int kBlock = 256;
constexpr int kBlocksPerSm = 4;
constexpr int kWarp = 32;
constexpr int kWarps = kBlock / kWarp;

/// 16-byte loads that each thread issues before it uses the first.
constexpr int kLoads = 4;

/// Elements in a full chunk, a function of the list's size alone so that results do not depend on the
/// GPU. A block waits for memory once in 16 KiB, so a small list is cut finer, to have it done on many SMs.
constexpr int64_t chunk_numel_for(int64_t total_numel) {
  return total_numel <= int64_t{1} << 24 ? int64_t{1} << 14 : kChunkNumel;
}

/// What the plan knows of one tensor. Shapes only; copied to the device when they change.
struct TensorPlan {
  int64_t unit_numel = 0;  ///< `Units::numel`; read where units matter only, as is the next
  int64_t first_unit = 0;  ///< `Units::first`
  int32_t first_chunk = 0;
  int32_t chunk_count = 0;  ///< 0 for an empty tensor
  DType dtype = DType::kFloat32;
  int32_t reserved = 0;
};
static_assert(sizeof(TensorPlan) == 32, "plans are copied to devices as they are");

/// The tables of one list, in device memory, 16-byte aligned. Chunks lie in the order of their tensors,
/// and within a tensor in the order of its elements.
struct Plan {
  const Chunk* chunks = nullptr;
  const TensorPlan* tensors = nullptr;
  uint32_t chunk_count = 0;  ///< below 2^31, as is the grid
  int32_t tensor_count = 0;
  int32_t filled_count = 0;  ///< tensors that have chunks
  int32_t reserved = 0;
};

/// Units that one chunk holds at most: eight for each warp, so that many short ones spread over many blocks.
constexpr int64_t kChunkUnits = 8 * kWarps;

/// Chunks of a tensor in a unit plan. A chunk holds whole units, or a piece of one: never the end of one
/// and the start of the next. The latter exactly where `units.numel > kChunkNumel`.
inline int64_t unit_chunk_numel(const Units& units) {
  const int64_t fit = units.numel > 0 ? kChunkNumel / units.numel : 0;
  return fit == 0 ? kChunkNumel : (fit < kChunkUnits ? fit : kChunkUnits) * units.numel;
}
inline int64_t unit_chunk_count(const Units& units) {
  if (units.numel > kChunkNumel) return units.count * chunk_count(units.numel);
  return chunk_count(units.count * units.numel, unit_chunk_numel(units));
}

/// Writes `unit_chunk_count(units)` chunks and returns the first place behind them.
inline Chunk* plan_units(int32_t tensor, const Units& units, Chunk* chunks) {
  if (units.numel <= kChunkNumel) {
    return plan(tensor, units.count * units.numel, chunks, unit_chunk_numel(units));
  }
  for (int64_t unit = 0; unit < units.count; ++unit) {
    Chunk* const end = plan(tensor, units.numel, chunks);
    for (; chunks != end; ++chunks) chunks->offset += unit * units.numel;
  }
  return chunks;
}

/// Scratch of the kernels that fold. `tickets` must be zero before the first launch that uses it, and is
/// zero again after every launch, so it is cleared once in its life. `partials` needs no clearing.
/// Launches that can run at the same time (other streams, a captured graph) must not share a workspace.
struct Workspace {
  Stats* partials = nullptr;    ///< `[chunk_count]`
  uint32_t* tickets = nullptr;  ///< `[tensor_count + 1]`: one per tensor, then the common one
};

constexpr size_t tickets_bytes(int64_t tensor_count) {
  return (static_cast<size_t>(tensor_count + 1) * sizeof(uint32_t) + 15) / 16 * 16;
}
constexpr size_t workspace_bytes(int64_t tensor_count, int64_t chunk_count) {
  return tickets_bytes(tensor_count) + static_cast<size_t>(chunk_count) * sizeof(Stats);
}
/// Lays a workspace out in `workspace_bytes` of device memory, aligned to 16: the tickets, to be cleared
/// once, come first.
inline Workspace carve_workspace(void* memory, int64_t tensor_count) {
  char* const bytes = static_cast<char*>(memory);
  return {reinterpret_cast<Stats*>(bytes + tickets_bytes(tensor_count)), reinterpret_cast<uint32_t*>(bytes)};
}

/// What the last block writes, and the numbers it needs for it. Every pointer but `rows` may be null:
/// that result is then not wanted.
struct Finish {
  Stats* rows = nullptr;          ///< `[tensor_count]`; the row of an empty tensor becomes the identity
  Stats* total = nullptr;         ///< merge of the rows
  double* norm = nullptr;         ///< `torch_norm(total)`
  double* coef = nullptr;         ///< `clip_coef(total, *limit or max_norm, eps, nonfinite)`
  float* found_inf = nullptr;     ///< exactly 1 if any element is NaN or Inf, else exactly 0
  float* grad_scale = nullptr;    ///< 1 / coef: the divisor of torch's fused optimizers
  const double* limit = nullptr;  ///< on the device; replaces `max_norm`
  double max_norm = INFINITY;
  double eps = 0;
  NonFinite nonfinite = NonFinite::kKeep;
};

/// Measures. Never writes to a gradient.
struct StatsArgs {
  Plan plan;
  Workspace workspace;
  Finish finish;
};

/// Clips by value and measures, in one pass: the statistics are those from before. A 16-byte vector in
/// which nothing changes is not written. `finish.nonfinite` says what becomes of NaN and Inf.
struct ValueArgs {
  Plan plan;
  Workspace workspace;
  Finish finish;
  double bounds[4] = {INFINITY, INFINITY, INFINITY, INFINITY};  ///< by DType: `round_to(dtype, clip_value)`
};

/// Which elements share a coefficient.
enum class CoefScope : int32_t {
  kGlobal = 0,  ///< `coef[0]` for all
  kTensor = 1,  ///< `coef[tensor]`
  kUnit = 2,    ///< `coef[first_unit + unit]`; needs a unit plan (`plan_units`)
};

/// Clips: element -> clamp(element * coef, -bound, bound), see `Action`. A block leaves at once when no
/// tensor changes, and skips every tensor (or unit) that does not. Takes the chunks from the last to the
/// first, because the end of what was measured before is what L2 still holds.
struct ApplyArgs {
  Plan plan;
  const double* coef = nullptr;
  const Stats* rows = nullptr;  ///< `[tensor_count]` of the gradients as they are now, or null: unknown
  double bounds[4] = {INFINITY, INFINITY, INFINITY, INFINITY};  ///< by DType, as in `ValueArgs`
  CoefScope scope = CoefScope::kGlobal;
  NonFinite nonfinite = NonFinite::kKeep;
};

/// Sums of the squares of the finite elements of every unit. Needs a unit plan. `partials` is
/// `[chunk_count]` and `tickets` `[tensor_count]`, cleared once, as in `Workspace`.
struct UnitSumsArgs {
  Plan plan;
  double* partials = nullptr;
  uint32_t* tickets = nullptr;
  double* sum_sq = nullptr;  ///< `[units of all tensors]`; units without elements are left as they are
};

/// Counts exponents, in the columns of core/exponents.h.
struct ExponentsArgs {
  Plan plan;
  int64_t* counts = nullptr;  ///< `[tensor_count, kExponentColumns]`; the caller clears it before each launch
};

/// Adds the gradient of `l1 * sum(abs(w)) + l2 * sum(w * w)`, which is `l1 * sign(w) + 2 * l2 * w`, to the
/// gradients. Reads gradients and weights once.
/// Takes `2 * tensor_count` addresses: the gradients, then their weights, of the same dtypes.
struct PenaltyArgs {
  Plan plan;
  double* partials = nullptr;   ///< `[chunk_count]`
  uint32_t* tickets = nullptr;  ///< `[tensor_count]`, cleared once, as in `Workspace`
  double l1 = 0;
  double l2 = 0;
  double* values = nullptr;  ///< `[tensor_count]`: the penalty; that of an empty tensor is left as it is
};

/// Where a kernel finds the address of tensor `t`: always the second kernel argument, in one of three
/// widths. Up to `kFewAddresses` fit, with the first argument, in the 4 KiB every driver takes; up to
/// `kManyAddresses` in the 32764 bytes of CUDA 12.1 and a driver from 530; any number in device memory.
constexpr int kFewAddresses = 448;
constexpr int kManyAddresses = 4000;

template <int kCapacity>
struct Addresses {
  void* data[kCapacity];
};
template <>
struct Addresses<0> {
  void* const* data;  ///< in device memory
};

constexpr size_t kLargestArgs = 4096 - sizeof(Addresses<kFewAddresses>);
static_assert(sizeof(StatsArgs) <= kLargestArgs && sizeof(ValueArgs) <= kLargestArgs, "exceeds 4 KiB");
static_assert(sizeof(ApplyArgs) <= kLargestArgs && sizeof(UnitSumsArgs) <= kLargestArgs, "exceeds 4 KiB");
static_assert(sizeof(ExponentsArgs) <= kLargestArgs && sizeof(PenaltyArgs) <= kLargestArgs, "exceeds 4 KiB");
static_assert(kLargestArgs + sizeof(Addresses<kManyAddresses>) <= 32764, "exceeds a large kernel argument");

enum class Kernel : int32_t {
  kStats = 0,
  kValue = 1,
  kApply = 2,
  kUnitSums = 3,
  kExponents = 4,
  kPenalty = 5
};

/// The kernel `template <int kCapacity> void <name>_kernel(<Name>Args, Addresses<kCapacity>)`, for
/// `cudaLaunchKernel(handle, grid_for(...), kBlock, {&args, &addresses}, 0, stream)`. `capacity` is 0,
/// `kFewAddresses` or `kManyAddresses`.
const void* kernel_handle(Kernel kernel, int capacity);

/// Name of a kernel, for error messages.
constexpr const char* kernel_name(Kernel kernel) {
  constexpr const char* kNames[] = {"stats_kernel",     "value_kernel",     "apply_kernel",
                                    "unit_sums_kernel", "exponents_kernel", "penalty_kernel"};
  return kNames[static_cast<int>(kernel)];
}

/// Blocks to launch: one for each chunk, which leaves balancing to the hardware. Apply, for which alone any
/// number does, gets as many as run at once, so that leaving at once costs one round of blocks.
///
/// Without chunks `kStats` and `kValue` still need their one block, to write the identity; there is nothing
/// to launch for the others.
constexpr uint32_t grid_for(Kernel kernel, uint32_t chunk_count, int sm_count) {
  const uint32_t resident = static_cast<uint32_t>(sm_count) * kBlocksPerSm;
  if (kernel == Kernel::kApply && chunk_count > resident) return resident;
  return chunk_count > 0 ? chunk_count : 1;
}

}  // namespace gradkern::cuda
