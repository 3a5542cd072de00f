#pragma once

#include <cstdint>
#include <cstring>

#include "../core/half.h"

/// The lanes type on 16-byte compiler vectors (GCC, Clang): SSE2 on x86-64, NEON on Arm.
///
/// It is also the specification. Another instruction set is a header with these names, wider registers and
/// the same bits from every operation. All work goes in steps of 32 elements:
///
///     U16, U32, U64   the bits of 32 elements, as they lie in memory
///     F32, F64        16 values to compute with; a `Pair` of them is a step
///     Register        one machine register, to collect largest magnitudes and counts of zeros in

namespace gradkern::cpu::portable {
namespace {

typedef float V4f __attribute__((vector_size(16)));
typedef double V2d __attribute__((vector_size(16)));
typedef int16_t V8i __attribute__((vector_size(16)));
typedef int32_t V4i __attribute__((vector_size(16)));
typedef int64_t V2i __attribute__((vector_size(16)));
typedef uint32_t V4u __attribute__((vector_size(16)));
typedef uint16_t V4h __attribute__((vector_size(8)));
typedef V4i Register;

struct U16 {
  V8i v[4];
};
struct U32 {
  V4i v[8];
};
struct U64 {
  V2i v[16];
};
struct F32 {
  V4f v[4];
};
struct F64 {
  V2d v[8];
};
template <class Values>
struct Pair {
  Values first, second;
};

/// 32 elements from and to any address.
inline U16 load_bits(const BFloat16* p) {
  U16 bits;
  memcpy(&bits, p, sizeof bits);
  return bits;
}
inline U16 load_bits(const Float16* p) { return load_bits(reinterpret_cast<const BFloat16*>(p)); }
inline U32 load_bits(const float* p) {
  U32 bits;
  memcpy(&bits, p, sizeof bits);
  return bits;
}
inline U64 load_bits(const double* p) {
  U64 bits;
  memcpy(&bits, p, sizeof bits);
  return bits;
}
template <class T, class Bits>
inline void store_bits(T* p, const Bits& bits) {
  memcpy(p, &bits, sizeof bits);
}

/// What the bits mean. A pair of bfloat16 holds the elements with even numbers, then those with odd ones,
/// since those are the halves of 32-bit words; every other pair holds 16 elements, then the next 16.
inline Pair<F32> values(U16 bits, BFloat16) {
  Pair<F32> pair;
  for (int i = 0; i < 4; ++i) {
    pair.first.v[i] = (V4f)((V4u)bits.v[i] << 16);
    pair.second.v[i] = (V4f)((V4u)bits.v[i] & 0xffff0000u);
  }
  return pair;
}
inline V4f widen_float16(V4u half) {
  // With the exponent's bias off by 112, a multiplication by 2^112 puts it right, subnormals included.
  const V4i scaled = (V4i)((V4f)((half & 0x7fffu) << 13) * 0x1p112f);
  const V4i nonfinite = (scaled >= 0x47800000) & 0x7f800000;  // 2^16 and above: Inf or NaN
  return (V4f)(scaled | nonfinite | (V4i)((half & 0x8000u) << 16));
}
inline Pair<F32> values(U16 bits, Float16) {
  Pair<F32> pair;
  for (int i = 0; i < 8; ++i) {
    V4h four;
    memcpy(&four, reinterpret_cast<const V4h*>(&bits) + i, sizeof four);
    (i < 4 ? pair.first : pair.second).v[i % 4] = widen_float16(__builtin_convertvector(four, V4u));
  }
  return pair;
}
inline Pair<F32> values(U32 bits, float) {
  Pair<F32> pair;
  memcpy(&pair, &bits, sizeof pair);
  return pair;
}
inline Pair<F64> values(U64 bits, double) {
  Pair<F64> pair;
  memcpy(&pair, &bits, sizeof pair);
  return pair;
}

/// The reverse; halves are rounded to nearest, ties to even, and a NaN stays a NaN.
inline V4u round_bfloat16(V4f x) {
  const V4u bits = (V4u)x;
  const V4u nan = (V4u)(x != x);
  return (nan & (bits | 0x400000u)) | (~nan & (bits + 0x7fffu + (bits >> 16 & 1u)));
}
inline U16 bits_of(Pair<F32> pair, BFloat16) {
  U16 bits;
  for (int i = 0; i < 4; ++i) {
    bits.v[i] =
        (V8i)(round_bfloat16(pair.first.v[i]) >> 16 | (round_bfloat16(pair.second.v[i]) & 0xffff0000u));
  }
  return bits;
}
inline U16 bits_of(Pair<F32> pair, Float16) {
  float values[32];
  memcpy(values, &pair, sizeof values);
  Float16 halves[32];
  for (int i = 0; i < 32; ++i) halves[i] = to_float16(values[i]);
  return load_bits(halves);
}
inline U32 bits_of(Pair<F32> pair, float) {
  U32 bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
inline U64 bits_of(Pair<F64> pair, double) {
  U64 bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

/// The bits without the sign. As integers they order as the magnitudes do, with Inf above every finite
/// value and NaN above Inf.
inline U16 magnitude(U16 x) {
  for (V8i& v : x.v) v &= 0x7fff;
  return x;
}
inline U32 magnitude(U32 x) {
  for (V4i& v : x.v) v &= 0x7fffffff;
  return x;
}
inline U64 magnitude(U64 x) {
  for (V2i& v : x.v) v &= 0x7fffffffffffffff;
  return x;
}

/// Lane by lane, the largest of what `most` holds and of the magnitudes `x`.
inline Register max_magnitude(Register most, const U16& x) {
  V8i m = (V8i)most;
  for (const V8i& v : x.v) m = v > m ? v : m;
  return (Register)m;
}
inline Register max_magnitude(Register most, const U32& x) {
  V4i m = most;
  for (const V4i& v : x.v) m = v > m ? v : m;
  return m;
}
inline Register max_magnitude(Register most, const U64& x) {
  V2i m = (V2i)most;
  for (const V2i& v : x.v) m = v > m ? v : m;
  return (Register)m;
}

/// Lane by lane, `count` and one more for every zero in `x`.
inline Register count_zeros(Register count, const U16& x) {
  V8i c = (V8i)count;
  for (const V8i& v : x.v) c -= v == 0;
  return (Register)c;
}
inline Register count_zeros(Register count, const U32& x) {
  for (const V4i& v : x.v) count -= v == 0;
  return count;
}
inline Register count_zeros(Register count, const U64& x) {
  V2i c = (V2i)count;
  for (const V2i& v : x.v) c -= v == 0;
  return (Register)c;
}
inline Register no_bits() { return Register{}; }
inline void store(void* p, Register x) { memcpy(p, &x, sizeof x); }

inline F64 load(const double* p) {
  F64 x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline void store(double* p, F64 x) { memcpy(p, &x, sizeof x); }
inline F32 broadcast(float x) {
  const V4f v = {x, x, x, x};
  return {{v, v, v, v}};
}
inline F64 broadcast(double x) {
  const V2d v = {x, x};
  return {{v, v, v, v, v, v, v, v}};
}

inline F64 widen(F32 x) {
  F64 wide;
  for (int i = 0; i < 4; ++i) {
    wide.v[2 * i] = V2d{x.v[i][0], x.v[i][1]};
    wide.v[2 * i + 1] = V2d{x.v[i][2], x.v[i][3]};
  }
  return wide;
}
inline F32 narrow(F64 x) {
  F32 slim;
  for (int i = 0; i < 4; ++i) {
    const V2d a = x.v[2 * i], b = x.v[2 * i + 1];
    slim.v[i] = V4f{(float)a[0], (float)a[1], (float)b[0], (float)b[1]};
  }
  return slim;
}

inline F64 add(F64 a, F64 b) {
  for (int i = 0; i < 8; ++i) a.v[i] += b.v[i];
  return a;
}
inline F64 mul(F64 a, F64 b) {
  for (int i = 0; i < 8; ++i) a.v[i] *= b.v[i];
  return a;
}
inline F32 mul(F32 a, F32 b) {
  for (int i = 0; i < 4; ++i) a.v[i] *= b.v[i];
  return a;
}

/// `sum + x * x` where the square is exact, as that of a widened float32 is: a fused multiply-add and a
/// separate multiplication and addition then agree, and each instruction set takes what it has.
inline F64 add_exact_square(F64 sum, F64 x) { return add(sum, mul(x, x)); }

/// `x` within `[-bound, bound]`; a NaN stays.
inline F32 clamp(F32 x, F32 bound) {
  for (int i = 0; i < 4; ++i) {
    const V4f below = x.v[i] > bound.v[i] ? bound.v[i] : x.v[i];
    x.v[i] = below < -bound.v[i] ? -bound.v[i] : below;
  }
  return x;
}
inline F64 clamp(F64 x, F64 bound) {
  for (int i = 0; i < 8; ++i) {
    const V2d below = x.v[i] > bound.v[i] ? bound.v[i] : x.v[i];
    x.v[i] = below < -bound.v[i] ? -bound.v[i] : below;
  }
  return x;
}

/// The magnitude.
inline F64 abs(F64 x) {
  for (V2d& v : x.v) v = (V2d)((V2i)v & 0x7fffffffffffffff);
  return x;
}

/// -1, 1, or `x` itself where it is a zero or NaN.
inline F64 sign(F64 x) {
  for (V2d& v : x.v) {
    const V2i nonzero = (v < 0.0) | (v > 0.0);
    const V2i one = ((V2i)v & INT64_MIN) | 0x3ff0000000000000;
    v = (V2d)((nonzero & one) | (~nonzero & (V2i)v));
  }
  return x;
}

}  // namespace
}  // namespace gradkern::cpu::portable
