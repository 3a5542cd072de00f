#pragma once

#include <cstdint>
#include <cstring>

#include "config.h"

/// Half-precision storage: what the bits mean, and how a float32 is rounded to them. All in integer
/// code, so that the result is the same on every machine and under every floating-point mode.

namespace gradkern {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

GRADKERN_FN uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

GRADKERN_FN float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

GRADKERN_FN float to_float(BFloat16 half) { return bits_float(uint32_t{half.bits} << 16); }

GRADKERN_FN float to_float(Float16 half) {
  const uint32_t sign = uint32_t{half.bits & 0x8000u} << 16;
  const uint32_t exponent = (half.bits >> 10) & 0x1fu;
  uint32_t fraction = half.bits & 0x3ffu;
  if (exponent == 0x1f) return bits_float(sign | 0x7f800000u | fraction << 13);
  if (exponent != 0) return bits_float(sign | (exponent + 112) << 23 | fraction << 13);
  if (fraction == 0) return bits_float(sign);
  // Subnormal: fraction * 2^-24, which is a normal float32.
  uint32_t shift = 0;
  for (; !(fraction & 0x400u); ++shift) fraction <<= 1;
  return bits_float(sign | (113 - shift) << 23 | (fraction & 0x3ffu) << 13);
}

/// Rounds to nearest, ties to even. A NaN stays a (quiet) NaN.
GRADKERN_FN BFloat16 to_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

/// Rounds to nearest, ties to even; magnitudes of 65520 and above become Inf. A NaN stays a (quiet) NaN.
GRADKERN_FN Float16 to_float16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520: halfway between the largest finite value and 2^16
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // 2^-14: the result is normal
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else if (magnitude > 0x33000000u) {              // above 2^-25: the result is subnormal and not zero
    const uint32_t shift = 126 - (magnitude >> 23);  // fraction * 2^(exponent-150) in units of 2^-24
    const uint32_t fraction = (magnitude & 0x7fffffu) | 0x800000u;
    half = fraction >> shift;
    const uint32_t rest = fraction & ((1u << shift) - 1);
    const uint32_t tie = 1u << (shift - 1);
    half += rest > tie || (rest == tie && (half & 1u));
  } else {
    half = 0;
  }
  return {static_cast<uint16_t>(sign | half)};
}

}  // namespace gradkern
