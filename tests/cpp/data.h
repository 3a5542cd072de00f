#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "core/plan.h"
#include "core/span.h"
#include "core/stats.h"

/// Gradients for the tests and what an independent calculation says of them. Nothing here uses the code
/// under test: halves are decoded by arithmetic and rounded by searching the list of all of them.

namespace data {

using gradkern::Chunk;
using gradkern::DType;
using gradkern::Span;
using gradkern::Stats;

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
constexpr DType kHalves[] = {DType::kBFloat16, DType::kFloat16};

inline const char* name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat64: return "float64";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
  }
  return "?";
}

inline int bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

/// Value of a half, from the definition of its format: sign, exponent, fraction.
inline double half_value(DType dtype, uint16_t bits) {
  const int fraction_bits = dtype == DType::kBFloat16 ? 7 : 10;
  const int bias = dtype == DType::kBFloat16 ? 127 : 15;
  const int exponent_mask = dtype == DType::kBFloat16 ? 0xff : 0x1f;
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  const int exponent = (bits >> fraction_bits) & exponent_mask;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  if (exponent == exponent_mask) return fraction != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign * std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
}

/// Bits of the half nearest to `value`, ties to the even one, overflow to Inf. Not for NaN.
inline uint16_t nearest_half(DType dtype, double value) {
  static std::vector<double> tables[2];
  std::vector<double>& table = tables[dtype == DType::kFloat16];
  if (table.empty()) {
    for (int bits = 0; std::isfinite(half_value(dtype, bits)); ++bits)
      table.push_back(half_value(dtype, bits));
    // One step further lies what would be the next value if the exponent went on: beyond half of that
    // step is Inf, whose bits are the next ones.
    table.push_back(2 * table.back() - table[table.size() - 2]);
  }
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  const size_t above = std::lower_bound(table.begin(), table.end(), magnitude) - table.begin();
  if (above == table.size()) return sign | static_cast<uint16_t>(table.size() - 1);
  if (above == 0) return sign;
  const double to_above = table[above] - magnitude, to_below = magnitude - table[above - 1];
  const bool up = to_above < to_below || (to_above == to_below && above % 2 == 0);
  return sign | static_cast<uint16_t>(up ? above : above - 1);
}

/// The same pseudo-random numbers everywhere (splitmix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }

  /// Any sign, magnitudes spread evenly over `decades` powers of ten below 1.
  double log_uniform(double decades) {
    const double magnitude = std::pow(10.0, -decades * uniform());
    return bits() & 1 ? magnitude : -magnitude;
  }

 private:
  uint64_t state_;
};

/// A gradient in memory of its own, `shift` elements off the allocation's alignment.
class Gradient {
 public:
  Gradient(DType dtype, int64_t numel, int64_t shift = 0)
      : dtype_(dtype), numel_(numel), shift_(shift), memory_((numel + shift) * bytes(dtype)) {}

  DType dtype() const { return dtype_; }
  int64_t numel() const { return numel_; }
  unsigned char* begin() { return memory_.data() + shift_ * bytes(dtype_); }
  const unsigned char* begin() const { return memory_.data() + shift_ * bytes(dtype_); }
  Span span() { return {begin(), numel_, dtype_}; }

  template <class T>
  T load(int64_t i) const {
    T element;
    memcpy(&element, begin() + i * sizeof(T), sizeof(T));
    return element;
  }
  template <class T>
  void store(int64_t i, T element) {
    memcpy(begin() + i * sizeof(T), &element, sizeof(T));
  }

  double operator[](int64_t i) const {
    switch (dtype_) {
      case DType::kFloat32: return load<float>(i);
      case DType::kFloat64: return load<double>(i);
      default: return half_value(dtype_, load<uint16_t>(i));
    }
  }

  /// Stores `value`, rounded to the dtype. NaN only as what the dtype makes of a NaN of its own.
  void set(int64_t i, double value) {
    switch (dtype_) {
      case DType::kFloat32: return store(i, static_cast<float>(value));
      case DType::kFloat64: return store(i, value);
      default: return store(i, std::isnan(value) ? uint16_t{0x7fc1} : nearest_half(dtype_, value));
    }
  }

  bool same_bits(const Gradient& other) const { return memory_ == other.memory_; }
  bool same_bits(const Gradient& other, int64_t i) const {
    return memcmp(begin() + i * bytes(dtype_), other.begin() + i * bytes(dtype_), bytes(dtype_)) == 0;
  }

 private:
  DType dtype_;
  int64_t numel_, shift_;
  std::vector<unsigned char> memory_;
};

/// Finite elements over many magnitudes, some of them zero.
inline Gradient finite(DType dtype, int64_t numel, int64_t shift = 0, uint64_t seed = 1) {
  Gradient gradient(dtype, numel, shift);
  Random random(seed);
  for (int64_t i = 0; i < numel; ++i) {
    gradient.set(i, random.bits() % 16 == 0 ? (random.bits() & 1 ? 0.0 : -0.0) : 8 * random.log_uniform(6));
  }
  return gradient;
}

/// The same with a NaN or an Inf here and there.
inline Gradient mixed(DType dtype, int64_t numel, int64_t shift = 0, uint64_t seed = 1) {
  Gradient gradient = finite(dtype, numel, shift, seed);
  Random random(seed + 1);
  for (int64_t i = 0; i < numel; ++i) {
    const uint64_t draw = random.bits() % 500;
    if (draw == 0) gradient.set(i, NAN);
    if (draw == 1) gradient.set(i, INFINITY);
    if (draw == 2) gradient.set(i, -INFINITY);
  }
  return gradient;
}

/// The statistics by definition, summed in extended precision where the machine has it.
inline Stats expected(const Gradient& gradient) {
  Stats stats;
  long double sum_sq = 0;
  for (int64_t i = 0; i < gradient.numel(); ++i) {
    const double value = gradient[i];
    if (std::isnan(value)) {
      stats.nan_count += 1;
    } else if (std::isinf(value)) {
      stats.inf_count += 1;
    } else {
      sum_sq += static_cast<long double>(value) * value;
      stats.abs_max = std::max(stats.abs_max, std::fabs(value));
      stats.zero_count += value == 0;
    }
  }
  stats.sum_sq = static_cast<double>(sum_sq);
  return stats;
}

inline bool same_bits(const Stats& a, const Stats& b) { return memcmp(&a, &b, sizeof a) == 0; }

inline std::vector<Chunk> chunks_of(int64_t numel) {
  std::vector<Chunk> chunks(gradkern::chunk_count(numel));
  gradkern::plan(0, numel, chunks.data());
  return chunks;
}

}  // namespace data
