#pragma once

#include <immintrin.h>

#include "../core/half.h"

/// The lanes type on AVX2, FMA and F16C. What each operation means: lanes_portable.h.

namespace gradkern::cpu::avx2 {
namespace {

typedef __m256i Register;

struct U16 {
  __m256i v[2];
};
struct U32 {
  __m256i v[4];
};
struct U64 {
  __m256i v[8];
};
struct F32 {
  __m256 v[2];
};
struct F64 {
  __m256d v[4];
};
template <class Values>
struct Pair {
  Values first, second;
};

template <class Bits>
inline Bits load_registers(const void* p) {
  Bits bits;
  int i = 0;
  for (__m256i& v : bits.v) v = _mm256_loadu_si256(static_cast<const __m256i*>(p) + i++);
  return bits;
}
inline U16 load_bits(const BFloat16* p) { return load_registers<U16>(p); }
inline U16 load_bits(const Float16* p) { return load_registers<U16>(p); }
inline U32 load_bits(const float* p) { return load_registers<U32>(p); }
inline U64 load_bits(const double* p) { return load_registers<U64>(p); }
template <class T, class Bits>
inline void store_bits(T* p, const Bits& bits) {
  int i = 0;
  for (const __m256i& v : bits.v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + i++, v);
}

inline __m256i high_halves() { return _mm256_set1_epi32(static_cast<int>(0xffff0000u)); }

inline Pair<F32> values(U16 bits, BFloat16) {
  Pair<F32> pair;
  for (int i = 0; i < 2; ++i) {
    pair.first.v[i] = _mm256_castsi256_ps(_mm256_slli_epi32(bits.v[i], 16));
    pair.second.v[i] = _mm256_castsi256_ps(_mm256_and_si256(bits.v[i], high_halves()));
  }
  return pair;
}
inline F32 widen_float16(__m256i halves) {
  return {{_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
           _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))}};
}
inline Pair<F32> values(U16 bits, Float16) { return {widen_float16(bits.v[0]), widen_float16(bits.v[1])}; }
inline Pair<F32> values(U32 bits, float) {
  return {{{_mm256_castsi256_ps(bits.v[0]), _mm256_castsi256_ps(bits.v[1])}},
          {{_mm256_castsi256_ps(bits.v[2]), _mm256_castsi256_ps(bits.v[3])}}};
}
inline Pair<F64> values(U64 bits, double) {
  Pair<F64> pair;
  for (int i = 0; i < 4; ++i) {
    pair.first.v[i] = _mm256_castsi256_pd(bits.v[i]);
    pair.second.v[i] = _mm256_castsi256_pd(bits.v[i + 4]);
  }
  return pair;
}

inline __m256i round_bfloat16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet, nan);
}
inline U16 bits_of(Pair<F32> pair, BFloat16) {
  U16 bits;
  for (int i = 0; i < 2; ++i) {
    const __m256i even = _mm256_srli_epi32(round_bfloat16(pair.first.v[i]), 16);
    bits.v[i] = _mm256_blend_epi16(even, round_bfloat16(pair.second.v[i]), 0xaa);
  }
  return bits;
}
inline __m256i narrow_float16(F32 x) {
  return _mm256_set_m128i(_mm256_cvtps_ph(x.v[1], _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(x.v[0], _MM_FROUND_TO_NEAREST_INT));
}
inline U16 bits_of(Pair<F32> pair, Float16) {
  return {{narrow_float16(pair.first), narrow_float16(pair.second)}};
}
inline U32 bits_of(Pair<F32> pair, float) {
  return {{_mm256_castps_si256(pair.first.v[0]), _mm256_castps_si256(pair.first.v[1]),
           _mm256_castps_si256(pair.second.v[0]), _mm256_castps_si256(pair.second.v[1])}};
}
inline U64 bits_of(Pair<F64> pair, double) {
  U64 bits;
  for (int i = 0; i < 4; ++i) {
    bits.v[i] = _mm256_castpd_si256(pair.first.v[i]);
    bits.v[i + 4] = _mm256_castpd_si256(pair.second.v[i]);
  }
  return bits;
}

template <class Bits>
inline Bits clear(Bits x, __m256i mask) {
  for (__m256i& v : x.v) v = _mm256_and_si256(v, mask);
  return x;
}
inline U16 magnitude(U16 x) { return clear(x, _mm256_set1_epi16(0x7fff)); }
inline U32 magnitude(U32 x) { return clear(x, _mm256_set1_epi32(0x7fffffff)); }
inline U64 magnitude(U64 x) { return clear(x, _mm256_set1_epi64x(0x7fffffffffffffff)); }

inline Register max_magnitude(Register most, const U16& x) {
  for (const __m256i& v : x.v) most = _mm256_max_epu16(most, v);
  return most;
}
inline Register max_magnitude(Register most, const U32& x) {
  for (const __m256i& v : x.v) most = _mm256_max_epu32(most, v);
  return most;
}
inline Register max_magnitude(Register most, const U64& x) {
  // The signed comparison will do: the sign bit of a magnitude is clear.
  for (const __m256i& v : x.v) most = _mm256_blendv_epi8(most, v, _mm256_cmpgt_epi64(v, most));
  return most;
}

inline Register count_zeros(Register count, const U16& x) {
  for (const __m256i& v : x.v) {
    count = _mm256_sub_epi16(count, _mm256_cmpeq_epi16(v, _mm256_setzero_si256()));
  }
  return count;
}
inline Register count_zeros(Register count, const U32& x) {
  for (const __m256i& v : x.v) {
    count = _mm256_sub_epi32(count, _mm256_cmpeq_epi32(v, _mm256_setzero_si256()));
  }
  return count;
}
inline Register count_zeros(Register count, const U64& x) {
  for (const __m256i& v : x.v) {
    count = _mm256_sub_epi64(count, _mm256_cmpeq_epi64(v, _mm256_setzero_si256()));
  }
  return count;
}
inline Register no_bits() { return _mm256_setzero_si256(); }
inline void store(void* p, Register x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

inline F64 load(const double* p) {
  F64 x;
  for (int i = 0; i < 4; ++i) x.v[i] = _mm256_loadu_pd(p + 4 * i);
  return x;
}
inline void store(double* p, F64 x) {
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, x.v[i]);
}
inline F32 broadcast(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
inline F64 broadcast(double x) {
  const __m256d v = _mm256_set1_pd(x);
  return {{v, v, v, v}};
}

inline F64 widen(F32 x) {
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(x.v[0])), _mm256_cvtps_pd(_mm256_extractf128_ps(x.v[0], 1)),
           _mm256_cvtps_pd(_mm256_castps256_ps128(x.v[1])),
           _mm256_cvtps_pd(_mm256_extractf128_ps(x.v[1], 1))}};
}
inline F32 narrow(F64 x) {
  return {{_mm256_set_m128(_mm256_cvtpd_ps(x.v[1]), _mm256_cvtpd_ps(x.v[0])),
           _mm256_set_m128(_mm256_cvtpd_ps(x.v[3]), _mm256_cvtpd_ps(x.v[2]))}};
}

inline F64 add(F64 a, F64 b) {
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_add_pd(a.v[i], b.v[i]);
  return a;
}
inline F64 mul(F64 a, F64 b) {
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_mul_pd(a.v[i], b.v[i]);
  return a;
}
inline F32 mul(F32 a, F32 b) { return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}}; }
inline F64 add_exact_square(F64 sum, F64 x) {
  for (int i = 0; i < 4; ++i) sum.v[i] = _mm256_fmadd_pd(x.v[i], x.v[i], sum.v[i]);
  return sum;
}

// min and max return their second operand where one is NaN, so that a NaN passes through both.
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

inline F64 abs(F64 x) {
  for (__m256d& v : x.v) v = _mm256_andnot_pd(_mm256_set1_pd(-0.0), v);
  return x;
}
inline F64 sign(F64 x) {
  for (__m256d& v : x.v) {
    const __m256d nonzero = _mm256_cmp_pd(v, _mm256_setzero_pd(), _CMP_NEQ_OQ);
    const __m256d one = _mm256_or_pd(_mm256_and_pd(v, _mm256_set1_pd(-0.0)), _mm256_set1_pd(1.0));
    v = _mm256_blendv_pd(v, one, nonzero);
  }
  return x;
}

}  // namespace
}  // namespace gradkern::cpu::avx2
