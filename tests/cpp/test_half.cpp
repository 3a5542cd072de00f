#include "core/half.h"

#include "check.h"
#include "data.h"

using namespace gradkern;

namespace {

uint16_t rounded(DType dtype, float value) {
  return dtype == DType::kBFloat16 ? to_bfloat16(value).bits : to_float16(value).bits;
}

float decoded(DType dtype, uint16_t bits) {
  return dtype == DType::kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
}

TEST(every_bit_pattern_has_its_value) {
  for (const DType dtype : data::kHalves) {
    for (int bits = 0; bits < 0x10000; ++bits) {
      const double expected = data::half_value(dtype, bits);
      const double actual = decoded(dtype, bits);
      CHECK_EQUAL_IN(data::name(dtype), std::isnan(actual), std::isnan(expected));
      if (!std::isnan(expected)) {
        CHECK_EQUAL_IN(data::name(dtype), actual, expected);
        CHECK_EQUAL_IN(data::name(dtype), std::signbit(actual), std::signbit(expected));
      }
    }
  }
}

TEST(every_bit_pattern_survives_a_round_trip) {
  for (const DType dtype : data::kHalves) {
    for (int bits = 0; bits < 0x10000; ++bits) {
      if (std::isnan(data::half_value(dtype, bits))) continue;
      CHECK_EQUAL_IN(data::name(dtype), rounded(dtype, decoded(dtype, bits)), bits);
    }
  }
}

TEST(a_nan_stays_a_nan_of_the_same_sign) {
  for (const uint32_t nan : {0x7fc00000u, 0x7f800001u, 0x7fffffffu, 0xffc12345u, 0xff800001u}) {
    for (const DType dtype : data::kHalves) {
      const uint16_t bits = rounded(dtype, bits_float(nan));
      CHECK(std::isnan(data::half_value(dtype, bits)));
      CHECK_EQUAL_IN(data::name(dtype), bits >= 0x8000, nan >= 0x80000000u);
    }
  }
}

/// Rounding can only change at the middle between two neighbours: so there, and one float32 to each side.
TEST(rounding_is_to_nearest_even_at_every_midpoint) {
  for (const DType dtype : data::kHalves) {
    for (int bits = 0; bits < 0x8000; ++bits) {
      const double low = data::half_value(dtype, bits);
      if (!std::isfinite(low)) break;
      double high = data::half_value(dtype, bits + 1);
      if (std::isinf(high)) high = 2 * low - data::half_value(dtype, bits - 1);
      const float middle = static_cast<float>((low + high) / 2);
      for (const float magnitude : {std::nextafter(middle, 0.0f), middle, std::nextafter(middle, INFINITY)}) {
        for (const float value : {magnitude, -magnitude}) {
          CHECK_EQUAL_IN(data::name(dtype), rounded(dtype, value), data::nearest_half(dtype, value));
        }
      }
    }
  }
}

TEST(rounding_is_to_nearest_even_between_them) {
  data::Random random(7);
  for (int i = 0; i < 200000; ++i) {
    const float value = bits_float(static_cast<uint32_t>(random.bits()));
    if (std::isnan(value)) continue;
    for (const DType dtype : data::kHalves) {
      CHECK_EQUAL_IN(data::name(dtype), rounded(dtype, value), data::nearest_half(dtype, value));
    }
  }
}

TEST(float16_overflows_at_65520) {
  CHECK_EQUAL(to_float16(65519.996f).bits, 0x7bff);
  CHECK_EQUAL(to_float16(65520.0f).bits, 0x7c00);
  CHECK_EQUAL(to_float16(-65520.0f).bits, 0xfc00);
}

}  // namespace
