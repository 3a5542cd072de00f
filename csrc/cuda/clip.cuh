#pragma once

#include "elements.cuh"

/// What becomes of an element: the part that the writing kernels share.

namespace gradkern::cuda {

/// How `element * coef` is computed. The results are those of the CPU kernels, bit for bit.
enum class Scale {
  kNone,
  kReal,  ///< in `Real<T>`: float64, and halves, whose rounding hides that of a float32 product
  /// In double, rounded once to `Real<T>`: float32, and halves where float32 would hold the coefficient as
  /// a subnormal. On consumer GPUs the three double-precision operations (two a clock and SM) take 1.5
  /// clocks an element, which the 2.6 clocks for its 8 bytes of traffic still hide.
  kDouble,
};

/// An `Action` as the kernels use it.
template <class T>
struct Clip {
  double coef;
  Real<T> bound;
  T upper, lower;  ///< what elements beyond the bound become
  bool select;     ///< NaN and Inf are kept or zeroed, rather than computed with
  bool zero;
};

template <class T>
GRADKERN_DEVICE Clip<T> make_clip(const Action& action) {
  const Real<T> bound = static_cast<Real<T>>(action.bound);
  return {action.coef, bound, narrow<T>(bound), narrow<T>(-bound), action.nonfinite != NonFinite::kPropagate,
          action.nonfinite == NonFinite::kZero};
}

template <class T, Scale kScale>
GRADKERN_DEVICE T clipped(T element, const Clip<T>& clip) {
  const Real<T> x = real(element);
  if (clip.select && !finite(x)) return clip.zero ? T{} : element;
  Real<T> y = x;
  if constexpr (kScale == Scale::kReal) y = x * static_cast<Real<T>>(clip.coef);
  if constexpr (kScale == Scale::kDouble) y = static_cast<Real<T>>(static_cast<double>(x) * clip.coef);
  // The bound is a value of T, so that clamping before the product is rounded to T changes nothing.
  if (y > clip.bound) return clip.upper;
  if (y < -clip.bound) return clip.lower;
  return kScale == Scale::kNone ? element : narrow<T>(y);
}

template <class T, Scale kScale>
GRADKERN_DEVICE void clip_one(T* element, const Clip<T>& clip) {
  *element = clipped<T, kScale>(*element, clip);
}

/// Clips what a thread has loaded. Vectors in which no bit changes are not written.
template <class T, Scale kScale>
GRADKERN_DEVICE void clip_batch(const Batch& batch, const Clip<T>& clip) {
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
    Vector<T> vector = elements<T>(batch.vector[k]);
#pragma unroll
    for (int e = 0; e < kWidth<T>; ++e) vector.element[e] = clipped<T, kScale>(vector.element[e], clip);
    const uint4 before = batch.vector[k], after = raw(vector);
    const bool changed = ((before.x ^ after.x) | (before.y ^ after.y) | (before.z ^ after.z) |
                          (before.w ^ after.w)) != 0;
    if (k < batch.count && changed) batch.at[k * batch.stride] = after;
  }
}

}  // namespace gradkern::cuda
