#include <thread>

#include "check.h"
#include "cpu/exponents.h"
#include "data.h"

using namespace gradkern;
using data::Gradient;

namespace {

/// The column by definition, from the value instead of the bits.
int expected_column(DType dtype, double value) {
  if (!std::isfinite(value)) return kNonFiniteColumn;
  if (value == 0) return kZeroColumn;
  const int exponent = std::ilogb(value);
  const int smallest_normal = dtype == DType::kFloat64 ? -1022 : dtype == DType::kFloat16 ? -14 : -126;
  if (exponent < smallest_normal) return kSubnormalColumn;
  return kFirstExponentColumn + std::clamp(exponent, kFirstExponent, kLastExponent) - kFirstExponent;
}

std::vector<int64_t> expected_counts(const Gradient& gradient) {
  std::vector<int64_t> counts(kExponentColumns);
  for (int64_t i = 0; i < gradient.numel(); ++i) ++counts[expected_column(gradient.dtype(), gradient[i])];
  return counts;
}

std::vector<int64_t> counts(Gradient& gradient) {
  const std::vector<Chunk> chunks = data::chunks_of(gradient.numel());
  std::vector<int64_t> found(kExponentColumns);
  const Span span = gradient.span();
  cpu::count_exponents(&span, chunks.data(), static_cast<int64_t>(chunks.size()), found.data());
  return found;
}

TEST(the_columns_end_where_the_exponents_do) {
  CHECK_EQUAL(kFirstExponentColumn + kLastExponent - kFirstExponent, kExponentColumns - 1);
}

TEST(every_half_is_counted_in_its_column) {
  for (const DType dtype : data::kHalves) {
    Gradient gradient(dtype, 0x10000);
    for (int i = 0; i < 0x10000; ++i) gradient.store(i, static_cast<uint16_t>(i));
    CHECK(counts(gradient) == expected_counts(gradient));
  }
}

TEST(every_exponent_is_counted_in_its_column) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
    for (int exponent = -1080; exponent <= 1030; ++exponent) {
      Gradient gradient(dtype, 2);
      gradient.set(0, std::ldexp(1.0, exponent));
      gradient.set(1, -std::ldexp(1.75, exponent));
      CHECK(counts(gradient) == expected_counts(gradient));
    }
  }
}

TEST(a_subnormal_of_float64_is_no_zero) {
  Gradient gradient(DType::kFloat64, 1);
  gradient.set(0, 0x1p-1074);
  CHECK_EQUAL(counts(gradient)[kSubnormalColumn], 1);
}

TEST(counts_are_added_to_what_is_there) {
  Gradient gradient = data::finite(DType::kFloat32, 100);
  const std::vector<Chunk> chunks = data::chunks_of(100);
  const Span span = gradient.span();
  std::vector<int64_t> found(kExponentColumns, 5);
  cpu::count_exponents(&span, chunks.data(), 1, found.data());
  for (int column = 0; column < kExponentColumns; ++column) {
    CHECK_EQUAL(found[column], 5 + expected_counts(gradient)[column]);
  }
}

TEST(threads_may_count_into_the_same_histogram) {
  Gradient gradient = data::mixed(DType::kBFloat16, 4 * kChunkNumel + 3);
  const std::vector<Chunk> chunks = data::chunks_of(gradient.numel());
  const Span span = gradient.span();
  std::vector<int64_t> found(kExponentColumns);
  std::vector<std::thread> threads;
  for (const Chunk& chunk : chunks) {
    threads.emplace_back([&span, &chunk, &found] { cpu::count_exponents(&span, &chunk, 1, found.data()); });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(found == expected_counts(gradient));
}

}  // namespace
