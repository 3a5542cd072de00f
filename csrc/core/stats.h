#pragma once

#include "config.h"

namespace gradkern {

/// What one read of some gradient elements tells. The only record that flows through gradkern: a lane,
/// a chunk, a tensor, a rank and a whole model each produce one, and `merge` combines them.
///
/// In memory it is one row of a contiguous float64 tensor `[tensors, kColumns]`.
/// Counts are doubles, exact up to 2^53 elements. The default value is the identity of `merge`.
struct Stats {
  double sum_sq = 0;      ///< sum of the squares of the finite elements
  double abs_max = 0;     ///< largest magnitude of the finite elements
  double nan_count = 0;   ///< elements that are NaN
  double inf_count = 0;   ///< elements that are +Inf or -Inf
  double zero_count = 0;  ///< elements that are +0 or -0
};

/// Columns of a row, in the order of the members of `Stats`.
constexpr int kColumns = 5;
static_assert(sizeof(Stats) == kColumns * sizeof(double), "a Stats is a row of float64");

/// Combines the records of two disjoint sets of elements. Associative and commutative up to the
/// rounding of `sum_sq`; exact in every other member.
GRADKERN_FN Stats merge(const Stats& a, const Stats& b) {
  Stats both;
  both.sum_sq = a.sum_sq + b.sum_sq;
  both.abs_max = a.abs_max > b.abs_max ? a.abs_max : b.abs_max;
  both.nan_count = a.nan_count + b.nan_count;
  both.inf_count = a.inf_count + b.inf_count;
  both.zero_count = a.zero_count + b.zero_count;
  return both;
}

/// The same for plain sums.
GRADKERN_FN double merge(double a, double b) { return a + b; }

GRADKERN_FN bool all_finite(const Stats& stats) { return stats.nan_count == 0 && stats.inf_count == 0; }

}  // namespace gradkern
