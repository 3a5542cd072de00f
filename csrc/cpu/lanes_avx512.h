#pragma once

#include <immintrin.h>

#include "../core/half.h"

/// The lanes type on AVX-512 (F, BW, DQ, VL). What each operation means: lanes_portable.h.

namespace gradkern::cpu::avx512 {
namespace {

typedef __m512i Register;

struct U16 {
  __m512i v[1];
};
struct U32 {
  __m512i v[2];
};
struct U64 {
  __m512i v[4];
};
struct F32 {
  __m512 v;
};
struct F64 {
  __m512d v[2];
};
template <class Values>
struct Pair {
  Values first, second;
};

template <class Bits>
inline Bits load_registers(const void* p) {
  Bits bits;
  int i = 0;
  for (__m512i& v : bits.v) v = _mm512_loadu_si512(static_cast<const __m512i*>(p) + i++);
  return bits;
}
inline U16 load_bits(const BFloat16* p) { return load_registers<U16>(p); }
inline U16 load_bits(const Float16* p) { return load_registers<U16>(p); }
inline U32 load_bits(const float* p) { return load_registers<U32>(p); }
inline U64 load_bits(const double* p) { return load_registers<U64>(p); }
template <class T, class Bits>
inline void store_bits(T* p, const Bits& bits) {
  int i = 0;
  for (const __m512i& v : bits.v) _mm512_storeu_si512(reinterpret_cast<__m512i*>(p) + i++, v);
}

inline Pair<F32> values(U16 bits, BFloat16) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(bits.v[0], 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(bits.v[0], high))}};
}
inline Pair<F32> values(U16 bits, Float16) {
  return {{_mm512_cvtph_ps(_mm512_castsi512_si256(bits.v[0]))},
          {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits.v[0], 1))}};
}
inline Pair<F32> values(U32 bits, float) {
  return {{_mm512_castsi512_ps(bits.v[0])}, {_mm512_castsi512_ps(bits.v[1])}};
}
inline Pair<F64> values(U64 bits, double) {
  return {{{_mm512_castsi512_pd(bits.v[0]), _mm512_castsi512_pd(bits.v[1])}},
          {{_mm512_castsi512_pd(bits.v[2]), _mm512_castsi512_pd(bits.v[3])}}};
}

inline __m512i round_bfloat16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
}
inline U16 bits_of(Pair<F32> pair, BFloat16) {
  const __m512i even = _mm512_srli_epi32(round_bfloat16(pair.first.v), 16);
  return {{_mm512_mask_blend_epi16(0xaaaaaaaa, even, round_bfloat16(pair.second.v))}};
}
inline U16 bits_of(Pair<F32> pair, Float16) {
  const __m256i low = _mm512_cvtps_ph(pair.first.v, _MM_FROUND_TO_NEAREST_INT);
  const __m256i high = _mm512_cvtps_ph(pair.second.v, _MM_FROUND_TO_NEAREST_INT);
  return {{_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)}};
}
inline U32 bits_of(Pair<F32> pair, float) {
  return {{_mm512_castps_si512(pair.first.v), _mm512_castps_si512(pair.second.v)}};
}
inline U64 bits_of(Pair<F64> pair, double) {
  return {{_mm512_castpd_si512(pair.first.v[0]), _mm512_castpd_si512(pair.first.v[1]),
           _mm512_castpd_si512(pair.second.v[0]), _mm512_castpd_si512(pair.second.v[1])}};
}

template <class Bits>
inline Bits clear(Bits x, __m512i mask) {
  for (__m512i& v : x.v) v = _mm512_and_si512(v, mask);
  return x;
}
inline U16 magnitude(U16 x) { return clear(x, _mm512_set1_epi16(0x7fff)); }
inline U32 magnitude(U32 x) { return clear(x, _mm512_set1_epi32(0x7fffffff)); }
inline U64 magnitude(U64 x) { return clear(x, _mm512_set1_epi64(0x7fffffffffffffff)); }

inline Register max_magnitude(Register most, const U16& x) { return _mm512_max_epu16(most, x.v[0]); }
inline Register max_magnitude(Register most, const U32& x) {
  return _mm512_max_epu32(most, _mm512_max_epu32(x.v[0], x.v[1]));
}
inline Register max_magnitude(Register most, const U64& x) {
  for (const __m512i& v : x.v) most = _mm512_max_epu64(most, v);
  return most;
}

inline Register count_zeros(Register count, const U16& x) {
  const __mmask32 zero = _mm512_testn_epi16_mask(x.v[0], x.v[0]);
  return _mm512_mask_add_epi16(count, zero, count, _mm512_set1_epi16(1));
}
inline Register count_zeros(Register count, const U32& x) {
  for (const __m512i& v : x.v) {
    count = _mm512_mask_add_epi32(count, _mm512_testn_epi32_mask(v, v), count, _mm512_set1_epi32(1));
  }
  return count;
}
inline Register count_zeros(Register count, const U64& x) {
  for (const __m512i& v : x.v) {
    count = _mm512_mask_add_epi64(count, _mm512_testn_epi64_mask(v, v), count, _mm512_set1_epi64(1));
  }
  return count;
}
inline Register no_bits() { return _mm512_setzero_si512(); }
inline void store(void* p, Register x) { _mm512_storeu_si512(p, x); }

inline F64 load(const double* p) { return {{_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}}; }
inline void store(double* p, F64 x) {
  _mm512_storeu_pd(p, x.v[0]);
  _mm512_storeu_pd(p + 8, x.v[1]);
}
inline F32 broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline F64 broadcast(double x) { return {{_mm512_set1_pd(x), _mm512_set1_pd(x)}}; }

inline F64 widen(F32 x) {
  return {{_mm512_cvtps_pd(_mm512_castps512_ps256(x.v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1))}};
}
inline F32 narrow(F64 x) {
  return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(x.v[0])), _mm512_cvtpd_ps(x.v[1]), 1)};
}

inline F64 add(F64 a, F64 b) { return {{_mm512_add_pd(a.v[0], b.v[0]), _mm512_add_pd(a.v[1], b.v[1])}}; }
inline F64 mul(F64 a, F64 b) { return {{_mm512_mul_pd(a.v[0], b.v[0]), _mm512_mul_pd(a.v[1], b.v[1])}}; }
inline F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F64 add_exact_square(F64 sum, F64 x) {
  return {{_mm512_fmadd_pd(x.v[0], x.v[0], sum.v[0]), _mm512_fmadd_pd(x.v[1], x.v[1], sum.v[1])}};
}

// min and max return their second operand where one is NaN, so that a NaN passes through both.
inline F32 clamp(F32 x, F32 bound) {
  const __m512 least = _mm512_xor_ps(bound.v, _mm512_set1_ps(-0.0f));
  return {_mm512_max_ps(least, _mm512_min_ps(bound.v, x.v))};
}
inline F64 clamp(F64 x, F64 bound) {
  for (int i = 0; i < 2; ++i) {
    const __m512d least = _mm512_xor_pd(bound.v[i], _mm512_set1_pd(-0.0));
    x.v[i] = _mm512_max_pd(least, _mm512_min_pd(bound.v[i], x.v[i]));
  }
  return x;
}

inline F64 abs(F64 x) {
  for (__m512d& v : x.v) v = _mm512_andnot_pd(_mm512_set1_pd(-0.0), v);
  return x;
}
inline F64 sign(F64 x) {
  for (__m512d& v : x.v) {
    const __mmask8 nonzero = _mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_NEQ_OQ);
    const __m512d one = _mm512_or_pd(_mm512_and_pd(v, _mm512_set1_pd(-0.0)), _mm512_set1_pd(1.0));
    v = _mm512_mask_mov_pd(v, nonzero, one);
  }
  return x;
}

}  // namespace
}  // namespace gradkern::cpu::avx512
