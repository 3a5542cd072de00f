#pragma once

#include <cstdint>

#include "config.h"

/// Histograms of base-2 exponents: how much room half precision leaves above and below the gradients.

namespace gradkern {

/// Columns of a histogram: three kinds of elements that have no exponent of their own, then
/// floor(log2(abs(element))) of the others, from `kFirstExponent` or less to `kLastExponent` or more.
/// float16 reaches from 2^-24 (subnormal below 2^-14) to 2^15; there is room on both sides for a loss scale.
constexpr int kExponentColumns = 64;
constexpr int kZeroColumn = 0;
constexpr int kSubnormalColumn = 1;  ///< subnormal in the dtype of the tensor
constexpr int kNonFiniteColumn = 2;
constexpr int kFirstExponentColumn = 3;
constexpr int kFirstExponent = -44;
constexpr int kLastExponent = kFirstExponent + kExponentColumns - kFirstExponentColumn - 1;  // 16

/// The column of an element whose bits, without the sign, are `magnitude`, in a format with that many
/// fraction and exponent bits.
GRADKERN_FN int exponent_column(uint64_t magnitude, int fraction_bits, int exponent_bits) {
  const int largest = (1 << exponent_bits) - 1;
  const int biased = static_cast<int>(magnitude >> fraction_bits);
  if (biased == largest) return kNonFiniteColumn;
  if (biased == 0) return magnitude == 0 ? kZeroColumn : kSubnormalColumn;
  const int exponent = biased - largest / 2;
  if (exponent <= kFirstExponent) return kFirstExponentColumn;
  return kFirstExponentColumn + (exponent < kLastExponent ? exponent : kLastExponent) - kFirstExponent;
}

}  // namespace gradkern
