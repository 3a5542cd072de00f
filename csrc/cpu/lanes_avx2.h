#pragma once

#include <immintrin.h>

#include "../core/half.h"

/// Sixteen lanes on AVX2, FMA and F16C. What each operation means: lanes_portable.h.

namespace gradkern::cpu::avx2 {
namespace {

struct F32 {
  __m256 v[2];
};
struct F64 {
  __m256d v[4];
};
struct U32 {
  __m256i v[2];
};
struct U64 {
  __m256i v[4];
};

inline const __m128i* m128(const void* p) { return static_cast<const __m128i*>(p); }

inline F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F64 load(const double* p) {
  return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4), _mm256_loadu_pd(p + 8), _mm256_loadu_pd(p + 12)};
}
inline __m256 widen_bfloat16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline F32 load(const BFloat16* p) {
  return {widen_bfloat16(_mm_loadu_si128(m128(p))), widen_bfloat16(_mm_loadu_si128(m128(p + 8)))};
}
inline F32 load(const Float16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(m128(p))), _mm256_cvtph_ps(_mm_loadu_si128(m128(p + 8)))};
}

inline void store(float* p, F32 x) {
  _mm256_storeu_ps(p, x.v[0]);
  _mm256_storeu_ps(p + 8, x.v[1]);
}
inline void store(double* p, F64 x) {
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, x.v[i]);
}
inline __m256i round_bfloat16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
inline void store(BFloat16* p, F32 x) {
  // packus works within 128-bit halves; the permutation puts the four quarters back in order.
  const __m256i packed = _mm256_packus_epi32(round_bfloat16(x.v[0]), round_bfloat16(x.v[1]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline void store(Float16* p, F32 x) {
  for (int i = 0; i < 2; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * i), _mm256_cvtps_ph(x.v[i], _MM_FROUND_TO_NEAREST_INT));
  }
}
inline void store(uint32_t* p, U32 x) {
  for (int i = 0; i < 2; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8 * i), x.v[i]);
}
inline void store(uint64_t* p, U64 x) {
  for (int i = 0; i < 4; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 4 * i), x.v[i]);
}

inline F64 widen(F32 x) {
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(x.v[0])), _mm256_cvtps_pd(_mm256_extractf128_ps(x.v[0], 1)),
          _mm256_cvtps_pd(_mm256_castps256_ps128(x.v[1])), _mm256_cvtps_pd(_mm256_extractf128_ps(x.v[1], 1))};
}
inline F32 narrow(F64 x) {
  return {_mm256_set_m128(_mm256_cvtpd_ps(x.v[1]), _mm256_cvtpd_ps(x.v[0])),
          _mm256_set_m128(_mm256_cvtpd_ps(x.v[3]), _mm256_cvtpd_ps(x.v[2]))};
}

inline F64 add(F64 a, F64 b) {
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_add_pd(a.v[i], b.v[i]);
  return a;
}
inline F64 mul(F64 a, F64 b) {
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_mul_pd(a.v[i], b.v[i]);
  return a;
}
inline F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}; }
inline F64 add_exact_square(F64 sum, F64 x) {
  for (int i = 0; i < 4; ++i) sum.v[i] = _mm256_fmadd_pd(x.v[i], x.v[i], sum.v[i]);
  return sum;
}

inline F32 clamp(F32 x, F32 bound) {
  for (int i = 0; i < 2; ++i) {
    const __m256 least = _mm256_xor_ps(bound.v[i], _mm256_set1_ps(-0.0f));
    x.v[i] = _mm256_max_ps(least, _mm256_min_ps(bound.v[i], x.v[i]));
  }
  return x;
}
inline F64 clamp(F64 x, F64 bound) {
  for (int i = 0; i < 4; ++i) {
    const __m256d least = _mm256_xor_pd(bound.v[i], _mm256_set1_pd(-0.0));
    x.v[i] = _mm256_max_pd(least, _mm256_min_pd(bound.v[i], x.v[i]));
  }
  return x;
}

inline U32 magnitude(F32 x) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_si256(_mm256_castps_si256(x.v[0]), mask),
          _mm256_and_si256(_mm256_castps_si256(x.v[1]), mask)};
}
inline U64 magnitude(F64 x) {
  U64 bits;
  for (int i = 0; i < 4; ++i) {
    bits.v[i] = _mm256_and_si256(_mm256_castpd_si256(x.v[i]), _mm256_set1_epi64x(0x7fffffffffffffff));
  }
  return bits;
}
inline U32 max(U32 a, U32 b) {
  return {_mm256_max_epu32(a.v[0], b.v[0]), _mm256_max_epu32(a.v[1], b.v[1])};
}
inline U64 max(U64 a, U64 b) {
  // The signed comparison will do: the sign bit of a magnitude is clear.
  for (int i = 0; i < 4; ++i) {
    a.v[i] = _mm256_blendv_epi8(a.v[i], b.v[i], _mm256_cmpgt_epi64(b.v[i], a.v[i]));
  }
  return a;
}

inline U32 count_zeros(U32 count, U32 x) {
  for (int i = 0; i < 2; ++i) {
    count.v[i] = _mm256_sub_epi32(count.v[i], _mm256_cmpeq_epi32(x.v[i], _mm256_setzero_si256()));
  }
  return count;
}
inline U64 count_zeros(U64 count, U64 x) {
  for (int i = 0; i < 4; ++i) {
    count.v[i] = _mm256_sub_epi64(count.v[i], _mm256_cmpeq_epi64(x.v[i], _mm256_setzero_si256()));
  }
  return count;
}

inline F32 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F64 broadcast(double x) {
  const __m256d v = _mm256_set1_pd(x);
  return {v, v, v, v};
}
inline U32 no_bits(U32*) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline U64 no_bits(U64*) {
  const __m256i v = _mm256_setzero_si256();
  return {v, v, v, v};
}

}  // namespace
}  // namespace gradkern::cpu::avx2
