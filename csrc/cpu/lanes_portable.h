#pragma once

#include <cstdint>
#include <cstring>

#include "../core/half.h"

/// Sixteen lanes on the compiler's own vectors (GCC, Clang): SSE2 on x86-64, NEON on Arm.
///
/// The specification of the lanes type. Another instruction set is a header with these names, in which
/// every operation gives these bits.

namespace gradkern::cpu::portable {
namespace {

typedef float F32 __attribute__((vector_size(64)));
typedef double F64 __attribute__((vector_size(128)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef uint64_t U64 __attribute__((vector_size(128)));
typedef uint16_t U16 __attribute__((vector_size(32)));

template <class Vector, class Element>
inline Vector copy_in(const Element* p) {
  Vector x;
  memcpy(&x, p, sizeof x);
  return x;
}
template <class Element, class Vector>
inline void copy_out(Element* p, Vector x) {
  memcpy(p, &x, sizeof x);
}

/// Sixteen elements from any address; halves become the float32 of the same value.
inline F32 load(const float* p) { return copy_in<F32>(p); }
inline F64 load(const double* p) { return copy_in<F64>(p); }
inline F32 load(const BFloat16* p) { return (F32)(__builtin_convertvector(copy_in<U16>(p), U32) << 16); }
inline F32 load(const Float16* p) {
  const U32 bits = __builtin_convertvector(copy_in<U16>(p), U32);
  // With the exponent's bias off by 112, a multiplication by 2^112 puts it right, subnormals included.
  const U32 scaled = (U32)((F32)((bits & 0x7fffu) << 13) * 0x1p112f);
  const U32 nonfinite = (U32)(scaled >= 0x47800000u) & 0x7f800000u;  // 2^16 and above: Inf or NaN
  return (F32)(scaled | nonfinite | (bits & 0x8000u) << 16);
}

/// Sixteen elements to any address; halves rounded to nearest even.
inline void store(float* p, F32 x) { copy_out(p, x); }
inline void store(double* p, F64 x) { copy_out(p, x); }
inline void store(BFloat16* p, F32 x) {
  const U32 bits = (U32)x;
  const U32 nan = (U32)((bits & 0x7fffffffu) > 0x7f800000u);
  const U32 rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  const U32 high = ((nan & (bits | 0x400000u)) | (~nan & rounded)) >> 16;
  copy_out(p, __builtin_convertvector(high, U16));
}
inline void store(Float16* p, F32 x) {
  for (int i = 0; i < 16; ++i) p[i] = to_float16(x[i]);
}
inline void store(uint32_t* p, U32 x) { copy_out(p, x); }
inline void store(uint64_t* p, U64 x) { copy_out(p, x); }

inline F64 widen(F32 x) { return __builtin_convertvector(x, F64); }
inline F32 narrow(F64 x) { return __builtin_convertvector(x, F32); }

inline F64 add(F64 a, F64 b) { return a + b; }
inline F64 mul(F64 a, F64 b) { return a * b; }
inline F32 mul(F32 a, F32 b) { return a * b; }

/// `sum + x * x` where the square is exact, as that of a widened float32 is: a fused multiply-add and a
/// separate multiplication and addition then agree, and each instruction set takes what it has.
inline F64 add_exact_square(F64 sum, F64 x) { return sum + x * x; }

/// `x` within `[-bound, bound]`; a NaN stays.
inline F32 clamp(F32 x, F32 bound) {
  x = x > bound ? bound : x;
  return x < -bound ? -bound : x;
}
inline F64 clamp(F64 x, F64 bound) {
  x = x > bound ? bound : x;
  return x < -bound ? -bound : x;
}

/// The bits without the sign. As integers they order as the magnitudes do, with Inf above every finite
/// value and NaN above Inf.
inline U32 magnitude(F32 x) { return (U32)x & 0x7fffffffu; }
inline U64 magnitude(F64 x) { return (U64)x & 0x7fffffffffffffffu; }
inline U32 max(U32 a, U32 b) { return a > b ? a : b; }
inline U64 max(U64 a, U64 b) { return a > b ? a : b; }

/// `count`, plus one in each lane where `x` is zero.
inline U32 count_zeros(U32 count, U32 x) { return count - (U32)(x == 0); }
inline U64 count_zeros(U64 count, U64 x) { return count - (U64)(x == 0); }

inline F32 broadcast(float x) { return x - F32{}; }
inline F64 broadcast(double x) { return x - F64{}; }
inline U32 no_bits(U32*) { return U32{}; }
inline U64 no_bits(U64*) { return U64{}; }

}  // namespace
}  // namespace gradkern::cpu::portable
