#include "core/stats.h"

#include "check.h"
#include "data.h"

using namespace gradkern;

namespace {

Stats some(int k) { return {1.5 * k, 2.0 * ((k * 7) % 5), 1.0 * k, 3.0 * k, 4.0 * k}; }

TEST(a_default_stats_is_the_identity_of_merge) {
  for (int k = 0; k < 5; ++k) {
    CHECK(data::same_bits(merge(some(k), Stats{}), some(k)));
    CHECK(data::same_bits(merge(Stats{}, some(k)), some(k)));
  }
}

TEST(merge_adds_sums_and_counts_and_takes_the_larger_magnitude) {
  const Stats both = merge({1, 5, 1, 2, 3}, {2, 4, 10, 20, 30});
  CHECK(data::same_bits(both, {3, 5, 11, 22, 33}));
}

TEST(merge_commutes) {
  for (int a = 0; a < 5; ++a) {
    for (int b = 0; b < 5; ++b) CHECK(data::same_bits(merge(some(a), some(b)), merge(some(b), some(a))));
  }
}

TEST(merge_is_associative) {
  for (int a = 0; a < 5; ++a) {
    for (int b = 0; b < 5; ++b) {
      for (int c = 0; c < 5; ++c) {
        CHECK(data::same_bits(merge(merge(some(a), some(b)), some(c)),
                              merge(some(a), merge(some(b), some(c)))));
      }
    }
  }
}

TEST(a_single_nan_or_inf_is_not_all_finite) {
  CHECK(all_finite(Stats{}));
  CHECK(all_finite({1, 1, 0, 0, 9}));
  CHECK(!all_finite({1, 1, 1, 0, 0}));
  CHECK(!all_finite({1, 1, 0, 1, 0}));
}

}  // namespace
