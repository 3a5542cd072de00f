#pragma once

#include "elements.cuh"

/// What becomes of an element: the part that the writing kernels share.

namespace gradkern::cuda {

/// Gives an element its new value, and writes it only if a bit changes.
template <class T, class NewValue>
GRADKERN_DEVICE void rewrite_one(T* element, NewValue new_value) {
  const T old = *element, now = new_value(old);
  if (bits_of(old) != bits_of(now)) *element = now;
}

/// The same for all that a thread has loaded. A vector is written whole, if a bit of it changes.
template <class T, class NewValue>
GRADKERN_DEVICE void rewrite(const Batch& batch, NewValue new_value) {
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
    Vector<T> vector = elements<T>(batch.vector[k]);
#pragma unroll
    for (int e = 0; e < kWidth<T>; ++e) vector.element[e] = new_value(vector.element[e]);
    const uint4 old = batch.vector[k], now = raw(vector);
    const uint32_t changed = (old.x ^ now.x) | (old.y ^ now.y) | (old.z ^ now.z) | (old.w ^ now.w);
    if (k < batch.count && changed) store(batch.at + k * batch.stride, now);
  }
}

/// Clamps without arithmetic: magnitudes compare as the integers that their bits are. So no NaN is
/// quieted, and what is within the bound keeps its bits.
template <class T>
struct Clamp {
  using Bits = typename Element<T>::Bits;
  static constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;
  static constexpr Bits kInf = kMagnitude >> Element<T>::kFractionBits << Element<T>::kFractionBits;

  Bits bound;
  NonFinite nonfinite;

  GRADKERN_MEMBER T operator()(T element) const {
    const Bits bits = bits_of(element), magnitude = bits & kMagnitude;
    if (magnitude >= kInf) {
      if (nonfinite == NonFinite::kZero) return T{};
      if (nonfinite == NonFinite::kKeep || magnitude > kInf) return element;
    }
    return magnitude > bound ? from_bits<T>((bits ^ magnitude) | bound) : element;
  }
};

/// How `element * coef` is computed. The results are those of the CPU kernels, bit for bit.
enum class Scale {
  kReal,  ///< in `Real<T>`: float64, and halves, whose rounding hides that of a float32 product
  /// In double, rounded once to `Real<T>`: float32, and halves where float32 would hold the coefficient as
  /// a subnormal. On consumer GPUs the three double-precision operations (two a clock and SM) take 1.5
  /// clocks an element, which the 2.6 clocks for its 8 bytes of traffic still hide.
  kDouble,
};

/// Multiplies by the coefficient, then clamps.
template <class T, Scale kScale>
struct ScaleAndClamp {
  double coef;
  Real<T> bound;
  T upper, lower;  ///< what elements beyond the bound become
  NonFinite nonfinite;

  GRADKERN_MEMBER T operator()(T element) const {
    const Real<T> x = real(element);
    if (nonfinite != NonFinite::kPropagate && !finite(x)) {
      return nonfinite == NonFinite::kZero ? T{} : element;
    }
    Real<T> y;
    if constexpr (kScale == Scale::kReal) {
      y = x * static_cast<Real<T>>(coef);
    } else {
      y = static_cast<Real<T>>(static_cast<double>(x) * coef);
    }
    // The bound is a value of T, so that clamping before the product is rounded to T changes nothing.
    return y > bound ? upper : y < -bound ? lower : narrow<T>(y);
  }
};

}  // namespace gradkern::cuda
