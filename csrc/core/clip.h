#pragma once

#include <cmath>
#include <cstdint>

#include "config.h"
#include "half.h"
#include "span.h"
#include "stats.h"

/// What clipping decides, from statistics alone: the coefficient, and which tensors have to be written.

namespace gradkern {

/// What becomes of NaN and Inf elements, and whether they take part in the norm.
enum class NonFinite : int32_t {
  kKeep = 0,       ///< stay as they are; the norm is that of the finite part
  kZero = 1,       ///< become +0; the norm is that of the finite part
  kPropagate = 2,  ///< take part in the arithmetic, as in torch
};

/// What happens to each element of one tensor: `clamp(element * coef, -bound, bound)`.
struct Action {
  double coef = 1;
  double bound = INFINITY;  ///< already rounded to the tensor's dtype
  NonFinite nonfinite = NonFinite::kKeep;
};

/// The 2-norm as torch gives it: NaN if any element is NaN, else Inf if any is Inf.
GRADKERN_FN double torch_norm(const Stats& stats) {
  if (stats.nan_count > 0) return NAN;
  if (stats.inf_count > 0) return INFINITY;
  return sqrt(stats.sum_sq);
}

/// `min(1, max_norm / (norm + eps))`, and 1 where there is nothing to clip: a norm of zero, or a limit
/// of Inf (which in torch turns a gradient of Inf into NaN everywhere).
GRADKERN_FN double clip_coef(const Stats& total, double max_norm, double eps, NonFinite nonfinite) {
  const double norm = nonfinite == NonFinite::kPropagate ? torch_norm(total) : sqrt(total.sum_sq);
  if (max_norm == INFINITY || norm == 0) return 1;
  const double coef = max_norm / (norm + eps);
  return coef > 1 ? 1 : coef;  // a NaN is not above 1, and stays
}

/// `bound` rounded to the nearest value of `dtype`, which is what an element can be clamped to.
GRADKERN_FN double round_to(DType dtype, double bound) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<float>(bound);
    case DType::kBFloat16: return to_float(to_bfloat16(static_cast<float>(bound)));
    case DType::kFloat16: return to_float(to_float16(static_cast<float>(bound)));
    default: return bound;
  }
}

/// Whether `action` can change a bit of a tensor with these statistics. False lets the tensor alone.
GRADKERN_FN bool changes(const Action& action, const Stats& stats) {
  const bool nonfinite = !all_finite(stats);
  if (action.nonfinite == NonFinite::kZero && nonfinite) return true;
  const bool propagates = action.nonfinite == NonFinite::kPropagate && nonfinite;
  // Neither a coefficient nor a bound moves a zero. `!(a <= b)` also holds where either is NaN.
  if (action.coef != 1) return stats.abs_max > 0 || propagates || action.coef != action.coef;
  return !(stats.abs_max <= action.bound) || (propagates && stats.inf_count > 0 && action.bound < INFINITY);
}

}  // namespace gradkern
