#include "core/clip.h"

#include "check.h"
#include "data.h"

using namespace gradkern;

namespace {

constexpr Stats kNorm5 = {25, 4, 0, 0, 7};
constexpr Stats kNorm5AndNan = {25, 4, 1, 0, 7};
constexpr Stats kNorm5AndInf = {25, 4, 0, 1, 7};

TEST(torch_norm_is_nan_before_inf_before_the_sum) {
  CHECK_EQUAL(torch_norm(kNorm5), 5.0);
  CHECK_EQUAL(torch_norm(kNorm5AndInf), INFINITY);
  CHECK(std::isnan(torch_norm(kNorm5AndNan)));
  CHECK(std::isnan(torch_norm(merge(kNorm5AndNan, kNorm5AndInf))));
}

TEST(the_coefficient_brings_the_norm_down_to_the_limit) {
  CHECK_EQUAL(clip_coef(kNorm5, 1, 0, NonFinite::kKeep), 0.2);
  CHECK_EQUAL(clip_coef(kNorm5, 2.5, 0, NonFinite::kPropagate), 0.5);
  CHECK_EQUAL(clip_coef(kNorm5, 0, 0, NonFinite::kKeep), 0.0);
}

TEST(eps_is_added_to_the_norm) { CHECK_EQUAL(clip_coef(kNorm5, 1, 5, NonFinite::kKeep), 0.1); }

TEST(the_coefficient_never_exceeds_one) {
  for (const double limit : {5.0, 6.0, 1e300, static_cast<double>(INFINITY)}) {
    CHECK_EQUAL(clip_coef(kNorm5, limit, 0, NonFinite::kKeep), 1.0);
  }
}

TEST(nothing_is_clipped_where_the_norm_is_zero) {
  for (const double limit : {0.0, 1.0}) CHECK_EQUAL(clip_coef(Stats{}, limit, 0, NonFinite::kKeep), 1.0);
}

TEST(keep_and_zero_clip_by_the_norm_of_the_finite_part) {
  for (const NonFinite word : {NonFinite::kKeep, NonFinite::kZero}) {
    CHECK_EQUAL(clip_coef(kNorm5AndNan, 1, 0, word), 0.2);
    CHECK_EQUAL(clip_coef(kNorm5AndInf, 1, 0, word), 0.2);
  }
}

TEST(propagate_clips_by_the_norm_of_everything) {
  CHECK_EQUAL(clip_coef(kNorm5AndInf, 1, 0, NonFinite::kPropagate), 0.0);
  CHECK(std::isnan(clip_coef(kNorm5AndNan, 1, 0, NonFinite::kPropagate)));
}

TEST(without_a_limit_nothing_becomes_nan) {
  for (const Stats& stats : {kNorm5AndNan, kNorm5AndInf}) {
    CHECK_EQUAL(clip_coef(stats, INFINITY, 0, NonFinite::kPropagate), 1.0);
  }
}

TEST(a_bound_is_rounded_to_the_nearest_value_of_the_dtype) {
  CHECK_EQUAL(round_to(DType::kFloat64, 0.1), 0.1);
  CHECK_EQUAL(round_to(DType::kFloat32, 0.1), static_cast<double>(0.1f));
  for (const DType dtype : data::kHalves) {
    for (const double bound : {0.0, 0.1, 0.5, 1.0, 1.0 / 3, 1e-7, 60000.0}) {
      CHECK_EQUAL_IN(data::name(dtype), round_to(dtype, bound),
                     data::half_value(dtype, data::nearest_half(dtype, bound)));
    }
  }
}

TEST(no_bound_stays_no_bound) {
  for (const DType dtype : data::kDTypes) CHECK_EQUAL(round_to(dtype, INFINITY), INFINITY);
  CHECK_EQUAL(round_to(DType::kFloat16, 1e6), INFINITY);
}

TEST(a_coefficient_of_one_without_a_bound_changes_nothing) {
  for (const NonFinite word : {NonFinite::kKeep, NonFinite::kZero, NonFinite::kPropagate}) {
    CHECK(!changes({1, INFINITY, word}, kNorm5));
  }
  CHECK(!changes({1, INFINITY, NonFinite::kKeep}, kNorm5AndNan));
}

TEST(a_coefficient_changes_whatever_is_not_zero) {
  CHECK(changes({0.5, INFINITY, NonFinite::kKeep}, kNorm5));
  CHECK(!changes({0.5, INFINITY, NonFinite::kKeep}, Stats{0, 0, 0, 0, 9}));
}

TEST(a_bound_changes_what_exceeds_it) {
  CHECK(!changes({1, 4, NonFinite::kKeep}, kNorm5));
  CHECK(changes({1, 3.9, NonFinite::kKeep}, kNorm5));
}

TEST(zero_changes_every_tensor_with_a_nonfinite_element) {
  CHECK(changes({1, INFINITY, NonFinite::kZero}, kNorm5AndNan));
  CHECK(changes({1, INFINITY, NonFinite::kZero}, kNorm5AndInf));
}

TEST(a_nan_coefficient_changes_everything_that_torch_would_change) {
  CHECK(changes({NAN, INFINITY, NonFinite::kPropagate}, kNorm5));
  CHECK(changes({NAN, INFINITY, NonFinite::kPropagate}, Stats{0, 0, 0, 0, 9}));
}

}  // namespace
