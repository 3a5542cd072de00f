#pragma once

#include <immintrin.h>

#include "../core/half.h"

/// Sixteen lanes on AVX-512 (F, BW, DQ, VL). What each operation means: lanes_portable.h.

namespace gradkern::cpu::avx512 {
namespace {

struct F32 {
  __m512 v;
};
struct F64 {
  __m512d lo, hi;
};
struct U32 {
  __m512i v;
};
struct U64 {
  __m512i lo, hi;
};

inline F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F64 load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
inline F32 load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline F32 load(const Float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
inline void store(double* p, F64 x) {
  _mm512_storeu_pd(p, x.lo);
  _mm512_storeu_pd(p + 8, x.hi);
}
inline void store(BFloat16* p, F32 x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i high = _mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
}
inline void store(Float16* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(uint32_t* p, U32 x) { _mm512_storeu_si512(p, x.v); }
inline void store(uint64_t* p, U64 x) {
  _mm512_storeu_si512(p, x.lo);
  _mm512_storeu_si512(p + 8, x.hi);
}

inline F64 widen(F32 x) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(x.v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1))};
}
inline F32 narrow(F64 x) {
  return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(x.lo)), _mm512_cvtpd_ps(x.hi), 1)};
}

inline F64 add(F64 a, F64 b) { return {_mm512_add_pd(a.lo, b.lo), _mm512_add_pd(a.hi, b.hi)}; }
inline F64 mul(F64 a, F64 b) { return {_mm512_mul_pd(a.lo, b.lo), _mm512_mul_pd(a.hi, b.hi)}; }
inline F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F64 add_exact_square(F64 sum, F64 x) {
  return {_mm512_fmadd_pd(x.lo, x.lo, sum.lo), _mm512_fmadd_pd(x.hi, x.hi, sum.hi)};
}

inline F32 clamp(F32 x, F32 bound) {
  const __m512 below = _mm512_min_ps(bound.v, x.v);
  return {_mm512_max_ps(_mm512_xor_ps(bound.v, _mm512_set1_ps(-0.0f)), below)};
}
inline F64 clamp(F64 x, F64 bound) {
  const __m512d sign = _mm512_set1_pd(-0.0);
  return {_mm512_max_pd(_mm512_xor_pd(bound.lo, sign), _mm512_min_pd(bound.lo, x.lo)),
          _mm512_max_pd(_mm512_xor_pd(bound.hi, sign), _mm512_min_pd(bound.hi, x.hi))};
}

inline U32 magnitude(F32 x) {
  return {_mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff))};
}
inline U64 magnitude(F64 x) {
  const __m512i mask = _mm512_set1_epi64(0x7fffffffffffffff);
  return {_mm512_and_si512(_mm512_castpd_si512(x.lo), mask), _mm512_and_si512(_mm512_castpd_si512(x.hi), mask)};
}
inline U32 max(U32 a, U32 b) { return {_mm512_max_epu32(a.v, b.v)}; }
inline U64 max(U64 a, U64 b) { return {_mm512_max_epu64(a.lo, b.lo), _mm512_max_epu64(a.hi, b.hi)}; }

inline U32 count_zeros(U32 count, U32 x) {
  return {_mm512_mask_add_epi32(count.v, _mm512_testn_epi32_mask(x.v, x.v), count.v, _mm512_set1_epi32(1))};
}
inline U64 count_zeros(U64 count, U64 x) {
  const __m512i one = _mm512_set1_epi64(1);
  return {_mm512_mask_add_epi64(count.lo, _mm512_testn_epi64_mask(x.lo, x.lo), count.lo, one),
          _mm512_mask_add_epi64(count.hi, _mm512_testn_epi64_mask(x.hi, x.hi), count.hi, one)};
}

inline F32 broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline F64 broadcast(double x) { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
inline U32 no_bits(U32*) { return {_mm512_setzero_si512()}; }
inline U64 no_bits(U64*) { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }

}  // namespace
}  // namespace gradkern::cpu::avx512
