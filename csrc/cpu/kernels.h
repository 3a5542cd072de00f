#pragma once

#include <cstdint>

#include "../core/clip.h"
#include "../core/plan.h"
#include "../core/span.h"
#include "../core/stats.h"

/// The CPU kernels: chunks in, partials out. They start no threads and allocate nothing; whoever calls
/// them hands disjoint ranges of one chunk table to as many threads as it likes.
///
/// The same input gives the same bits from every instruction set and for every division among threads:
/// each chunk is summed in `kSumLanes` double-precision lanes, element i of the chunk in lane
/// i % kSumLanes, folded in a fixed order. Every entry clears flush-to-zero for its thread and puts it
/// back.

namespace gradkern::cpu {

constexpr int kSumLanes = 32;

/// One instruction set's kernels. Spans, units and actions are indexed by
/// the tensor of a chunk or range.
struct Kernels {
  const char* isa;

  /// Writes the statistics of `chunks[i]` to `partials[i]`.
  void (*measure)(const Span* spans, const Chunk* chunks, int64_t count, Stats* partials);

  /// Replaces each element by `clamp(element * coef, -bound, bound)`, rounded once to the dtype; NaN and
  /// Inf as the action's `nonfinite` says. Does not look whether anything changes: see `changes()`.
  void (*apply)(const Span* spans, const Chunk* chunks, int64_t count, const Action* actions);

  /// `measure`, then `apply` with a coefficient of 1, block by block while the data is in cache; blocks
  /// that do not change are not written. The statistics are those from before.
  void (*clamp)(const Span* spans, const Chunk* chunks, int64_t count, const Action* actions,
                Stats* partials);

  /// Writes the sum of squares of the finite elements of each unit to `sum_sq[units.first + unit]`.
  void (*unit_sums)(const Span* spans, const Units* units, const UnitRange* ranges, int64_t count,
                    double* sum_sq);

  /// `apply` with a coefficient of its own for each unit, `coefs[units.first + unit]`, in the place of the
  /// action's. Units with a coefficient of 1 and no bound are left alone.
  void (*apply_units)(const Span* spans, const Units* units, const UnitRange* ranges, int64_t count,
                      const Action* actions, const double* coefs);

  /// Adds `l1 * sign(weight) + 2 * l2 * weight` to the gradients, and writes the sum of
  /// `l1 * abs(weight) + l2 * weight * weight` over `chunks[i]` to `values[i]`. Weights have the gradients'
  /// dtypes and layouts.
  void (*add_penalty)(const Span* grads, const Span* weights, const Chunk* chunks, int64_t count, double l1,
                      double l2, double* values);

  /// Only the sum of squares, as precisely: what the other statistics cost is measured against this.
  void (*measure_sum_sq)(const Span* spans, const Chunk* chunks, int64_t count, Stats* partials);
};

/// The kernels in use: the best this machine runs, or the set named by the environment variable
/// `GRADKERN_ISA` or by `select`.
const Kernels& kernels();

/// The sets this build carries and this machine runs, best first. Returns how many were written.
constexpr int kMaxSets = 3;
int available(const Kernels* sets[kMaxSets]);

/// Uses the set of that name from now on. False, and nothing changed, if it is not available.
bool select(const char* isa);

/// Why `GRADKERN_ISA` was not followed, or null.
const char* selection_problem();

}  // namespace gradkern::cpu
