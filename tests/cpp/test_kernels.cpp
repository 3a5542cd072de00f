#include "cpu/kernels.h"

#include "check.h"
#include "data.h"

using namespace gradkern;
using data::Gradient;

namespace {

constexpr NonFinite kWords[] = {NonFinite::kKeep, NonFinite::kZero, NonFinite::kPropagate};

std::vector<const cpu::Kernels*> sets() {
  const cpu::Kernels* all[cpu::kMaxSets];
  const int count = cpu::available(all);
  return {all, all + count};
}

/// Sizes at the edges of the design: a vector, the lanes of the sum, the block, the chunk.
std::vector<int64_t> sizes() {
  std::vector<int64_t> all = {1, 2, 3};
  for (const int64_t edge : {int64_t{16}, int64_t{cpu::kSumLanes}, int64_t{2048}, kChunkNumel}) {
    for (const int64_t off : {-1, 0, 1}) all.push_back(edge + off);
  }
  return all;
}

std::string context(const cpu::Kernels* set, const Gradient& gradient) {
  return std::string(set->isa) + " " + data::name(gradient.dtype()) + " [" +
         std::to_string(gradient.numel()) + "]";
}

Stats measure(const cpu::Kernels* set, Gradient& gradient) {
  const std::vector<Chunk> chunks = data::chunks_of(gradient.numel());
  std::vector<Stats> partials(chunks.size());
  const Span span = gradient.span();
  set->measure(&span, chunks.data(), static_cast<int64_t>(chunks.size()), partials.data());
  return fold(partials.data(), static_cast<int64_t>(partials.size()));
}

void apply(const cpu::Kernels* set, Gradient& gradient, const Action& action) {
  const std::vector<Chunk> chunks = data::chunks_of(gradient.numel());
  const Span span = gradient.span();
  set->apply(&span, chunks.data(), static_cast<int64_t>(chunks.size()), &action);
}

Stats clamp(const cpu::Kernels* set, Gradient& gradient, const Action& action) {
  const std::vector<Chunk> chunks = data::chunks_of(gradient.numel());
  std::vector<Stats> partials(chunks.size());
  const Span span = gradient.span();
  set->clamp(&span, chunks.data(), static_cast<int64_t>(chunks.size()), &action, partials.data());
  return fold(partials.data(), static_cast<int64_t>(partials.size()));
}

void check_stats(const std::string& where, const Stats& actual, const Stats& expected) {
  CHECK(std::fabs(actual.sum_sq - expected.sum_sq) <= 1e-12 * expected.sum_sq);
  CHECK_EQUAL_IN(where, actual.abs_max, expected.abs_max);
  CHECK_EQUAL_IN(where, actual.nan_count, expected.nan_count);
  CHECK_EQUAL_IN(where, actual.inf_count, expected.inf_count);
  CHECK_EQUAL_IN(where, actual.zero_count, expected.zero_count);
}

double clamped(double value, double bound) { return value > bound ? bound : value < -bound ? -bound : value; }

/// What `apply` has to leave of element i, by the rules of the contract. `same` says that its bits stay.
struct Expected {
  bool same = false;
  double value = 0;
};

Expected expected_element(const Gradient& before, int64_t i, const Action& action) {
  const double x = before[i];
  if (!std::isfinite(x) && action.nonfinite == NonFinite::kKeep) return {true, 0};
  if (!std::isfinite(x) && action.nonfinite == NonFinite::kZero) return {false, 0};
  switch (before.dtype()) {
    case DType::kFloat64: return {false, clamped(x * action.coef, action.bound)};
    case DType::kFloat32: return {false, clamped(static_cast<float>(x * action.coef), action.bound)};
    default: break;
  }
  // Halves: in float32, but for a coefficient that is too small to be a normal one.
  const bool tiny = static_cast<float>(action.coef) < 0x1p-126f && action.coef != 0;
  const float product =
      tiny ? static_cast<float>(x * action.coef) : static_cast<float>(x) * static_cast<float>(action.coef);
  const double value = clamped(product, action.bound);
  if (std::isnan(value)) return {false, value};
  return {false, data::half_value(before.dtype(), data::nearest_half(before.dtype(), value))};
}

void check_applied(const std::string& where, const Gradient& before, const Gradient& after,
                   const Action& action) {
  for (int64_t i = 0; i < before.numel(); ++i) {
    const Expected expected = expected_element(before, i, action);
    if (expected.same) {
      CHECK(after.same_bits(before, i));
    } else if (std::isnan(expected.value)) {
      CHECK(std::isnan(after[i]));
    } else {
      CHECK_EQUAL_IN(where, after[i], expected.value);
      CHECK_EQUAL_IN(where, std::signbit(after[i]), std::signbit(expected.value));
    }
  }
}

/// Every half there is, in an order that mixes magnitudes and puts NaN and Inf into every block.
Gradient every_half(DType dtype) {
  Gradient gradient(dtype, 0x10000);
  for (int i = 0; i < 0x10000; ++i) gradient.store(i, static_cast<uint16_t>(i * 40503));
  return gradient;
}

TEST(statistics_match_the_definition_at_every_edge) {
  for (const cpu::Kernels* set : sets()) {
    for (const DType dtype : data::kDTypes) {
      for (const int64_t numel : sizes()) {
        for (const bool with_nonfinite : {false, true}) {
          Gradient gradient = with_nonfinite ? data::mixed(dtype, numel) : data::finite(dtype, numel);
          check_stats(context(set, gradient), measure(set, gradient), data::expected(gradient));
        }
      }
    }
  }
}

TEST(statistics_do_not_depend_on_alignment) {
  for (const cpu::Kernels* set : sets()) {
    for (const DType dtype : data::kDTypes) {
      Gradient aligned = data::mixed(dtype, 5000);
      const Stats expected = measure(set, aligned);
      for (int64_t shift = 1; shift <= 32; ++shift) {
        Gradient shifted = data::mixed(dtype, 5000, shift);
        CHECK(data::same_bits(measure(set, shifted), expected));
      }
    }
  }
}

TEST(every_half_alone_has_its_statistics) {
  for (const cpu::Kernels* set : sets()) {
    for (const DType dtype : data::kHalves) {
      Gradient gradient = every_half(dtype);
      std::vector<Chunk> chunks(0x10000);
      CHECK(plan(0, 0x10000, chunks.data(), 1) == chunks.data() + chunks.size());
      std::vector<Stats> partials(chunks.size());
      const Span span = gradient.span();
      set->measure(&span, chunks.data(), static_cast<int64_t>(chunks.size()), partials.data());
      for (int64_t i = 0; i < 0x10000; ++i) {
        const double value = gradient[i];
        const bool finite = std::isfinite(value);
        const Stats expected = {finite ? value * value : 0, finite ? std::fabs(value) : 0,
                                1.0 * std::isnan(value), 1.0 * std::isinf(value), 1.0 * (value == 0)};
        CHECK(data::same_bits(partials[i], expected));
      }
    }
  }
}

TEST(a_non_finite_element_is_seen_wherever_it_stands) {
  for (const cpu::Kernels* set : sets()) {
    for (const DType dtype : data::kDTypes) {
      for (int64_t place = 0; place < 131; ++place) {
        Gradient gradient = data::finite(dtype, 131);
        gradient.set(place, place % 2 ? NAN : -INFINITY);
        check_stats(context(set, gradient), measure(set, gradient), data::expected(gradient));
      }
    }
  }
}

TEST(sums_neither_overflow_nor_vanish_in_float32) {
  for (const cpu::Kernels* set : sets()) {
    for (const double value : {3e38, 1e20, 1e-25, 1e-38, 1e-45}) {
      Gradient gradient(DType::kFloat32, 5000);
      for (int64_t i = 0; i < 5000; ++i) gradient.set(i, value);
      check_stats(context(set, gradient), measure(set, gradient), data::expected(gradient));
    }
  }
}

TEST(the_sum_alone_is_the_sum_of_the_statistics) {
  for (const cpu::Kernels* set : sets()) {
    for (const DType dtype : data::kDTypes) {
      for (const int64_t numel : sizes()) {
        Gradient gradient = data::finite(dtype, numel);
        const std::vector<Chunk> chunks = data::chunks_of(numel);
        std::vector<Stats> partials(chunks.size());
        const Span span = gradient.span();
        set->measure_sum_sq(&span, chunks.data(), static_cast<int64_t>(chunks.size()), partials.data());
        const Stats sum = fold(partials.data(), static_cast<int64_t>(partials.size()));
        CHECK_EQUAL_IN(context(set, gradient), sum.sum_sq, measure(set, gradient).sum_sq);
      }
    }
  }
}

TEST(measuring_does_not_write) {
  for (const cpu::Kernels* set : sets()) {
    for (const DType dtype : data::kDTypes) {
      Gradient gradient = data::mixed(dtype, 5000, 3);
      const Gradient before = gradient;
      measure(set, gradient);
      CHECK(gradient.same_bits(before));
    }
  }
}

TEST(elements_are_multiplied_and_clamped_by_the_rules) {
  for (const cpu::Kernels* set : sets()) {
    for (const DType dtype : data::kDTypes) {
      for (const double coef : {1.0, 0.5, 1.0 / 3, 1e-3, 1e-30, 1e-42, 1e-60, 0.0}) {
        for (const double bound : {static_cast<double>(INFINITY), 0.5, 0.0}) {
          for (const NonFinite word : kWords) {
            const Action action = {coef, round_to(dtype, bound), word};
            const Gradient before = data::mixed(dtype, 2048 + 37, 1);
            Gradient after = before;
            apply(set, after, action);
            check_applied(context(set, after), before, after, action);
          }
        }
      }
    }
  }
}

TEST(every_half_is_multiplied_and_rounded_by_the_rules) {
  for (const cpu::Kernels* set : sets()) {
    for (const DType dtype : data::kHalves) {
      const Gradient before = every_half(dtype);
      for (const double coef : {1.0, 0.7, 1.0 / 3, 1e-4, 1e-40}) {
        for (const NonFinite word : kWords) {
          const Action action = {coef, INFINITY, word};
          Gradient after = before;
          apply(set, after, action);
          check_applied(context(set, after), before, after, action);
        }
      }
    }
  }
}

TEST(applying_stops_at_the_end_of_the_gradient_at_every_edge) {
  for (const cpu::Kernels* set : sets()) {
    for (const DType dtype : data::kDTypes) {
      for (const int64_t numel : sizes()) {
        for (const int64_t shift : {0, 1, 5}) {
          const Gradient before = data::mixed(dtype, numel, shift);
          Gradient after = before;
          const Action action = {0.25, INFINITY, NonFinite::kKeep};
          apply(set, after, action);
          check_applied(context(set, after), before, after, action);
        }
      }
    }
  }
}

TEST(clamping_gives_the_statistics_from_before_and_the_elements_of_apply) {
  for (const cpu::Kernels* set : sets()) {
    for (const DType dtype : data::kDTypes) {
      for (const double bound : {static_cast<double>(INFINITY), 100.0, 0.5, 0.0}) {
        for (const NonFinite word : kWords) {
          for (const int64_t numel : {int64_t{33}, int64_t{5000}, kChunkNumel + 1}) {
            const Action action = {1, round_to(dtype, bound), word};
            Gradient before = data::mixed(dtype, numel);
            Gradient after = before;
            CHECK(data::same_bits(clamp(set, after, action), measure(set, before)));
            check_applied(context(set, after), before, after, action);
          }
        }
      }
    }
  }
}

TEST(where_changes_says_no_applying_changes_no_bit) {
  for (const cpu::Kernels* set : sets()) {
    for (const DType dtype : data::kDTypes) {
      for (const bool with_nonfinite : {false, true}) {
        Gradient before = with_nonfinite ? data::mixed(dtype, 3000) : data::finite(dtype, 3000);
        const Stats stats = data::expected(before);
        for (const double coef : {1.0, 0.5}) {
          for (const double bound : {static_cast<double>(INFINITY), 100.0, stats.abs_max, 0.5}) {
            for (const NonFinite word : kWords) {
              const Action action = {coef, round_to(dtype, bound), word};
              Gradient after = before;
              apply(set, after, action);
              CHECK(changes(action, stats) || after.same_bits(before));
            }
          }
        }
      }
    }
  }
}

/// A gradient seen as `count` units, cut into ranges that do not fit evenly.
struct UnitTable {
  Units units;
  std::vector<UnitRange> ranges;

  UnitTable(int64_t count, int64_t numel, int64_t first) : units{count, numel, first} {
    for (int64_t begin = 0; begin < count; begin += 3)
      ranges.push_back({begin, std::min(begin + 3, count), 0});
  }
  int64_t range_count() const { return static_cast<int64_t>(ranges.size()); }
};

/// Numels of a unit, from empty to more than a chunk, beside how many of them are tried.
constexpr struct {
  int64_t numel, count;
} kUnits[] = {{0, 4}, {1, 7}, {31, 10}, {33, 1}, {2049, 4}, {kChunkNumel + 5, 2}};

Gradient unit_of(const Gradient& gradient, int64_t unit, int64_t numel) {
  Gradient part(gradient.dtype(), numel);
  const int64_t bytes = numel * data::bytes(gradient.dtype());
  if (bytes > 0) memcpy(part.begin(), gradient.begin() + unit * bytes, bytes);
  return part;
}

TEST(every_unit_has_its_sum_of_squares) {
  for (const cpu::Kernels* set : sets()) {
    for (const DType dtype : data::kDTypes) {
      for (const auto [numel, count] : kUnits) {
        Gradient gradient = data::mixed(dtype, numel * count, 1);
        const UnitTable table(count, numel, 2);
        std::vector<double> sums(count + 3, -1.0);
        const Span span = gradient.span();
        set->unit_sums(&span, &table.units, table.ranges.data(), table.range_count(), sums.data());
        for (int64_t unit = 0; unit < count; ++unit) {
          Gradient part = unit_of(gradient, unit, numel);
          CHECK_EQUAL_IN(context(set, part), sums[2 + unit], measure(set, part).sum_sq);
        }
        for (const int64_t outside : {int64_t{0}, int64_t{1}, count + 2}) CHECK_EQUAL(sums[outside], -1.0);
      }
    }
  }
}

TEST(every_unit_is_multiplied_by_its_own_coefficient) {
  for (const cpu::Kernels* set : sets()) {
    for (const DType dtype : data::kDTypes) {
      for (const auto [numel, count] : kUnits) {
        for (const NonFinite word : kWords) {
          const Gradient before = data::mixed(dtype, numel * count, 1);
          Gradient after = before;
          const UnitTable table(count, numel, 2);
          std::vector<double> coefs(count + 2, NAN);
          for (int64_t unit = 0; unit < count; ++unit) coefs[2 + unit] = 1.0 / static_cast<double>(1 + unit);
          Action action = {NAN, INFINITY, word};
          const Span span = after.span();
          set->apply_units(&span, &table.units, table.ranges.data(), table.range_count(), &action,
                           coefs.data());
          for (int64_t unit = 0; unit < count; ++unit) {
            action.coef = coefs[2 + unit];
            const Gradient part = unit_of(after, unit, numel);
            check_applied(context(set, part), unit_of(before, unit, numel), part, action);
          }
        }
      }
    }
  }
}

TEST(a_penalty_is_valued_and_its_gradient_added) {
  constexpr double l1 = 0.01, l2 = 0.3;
  for (const cpu::Kernels* set : sets()) {
    for (const DType dtype : data::kDTypes) {
      for (const int64_t numel : {int64_t{1}, int64_t{31}, int64_t{33}, kChunkNumel + 1}) {
        const Gradient before = data::finite(dtype, numel, 1, 21);
        Gradient weights = data::finite(dtype, numel, 3, 22);
        const Gradient weights_before = weights;
        Gradient after = before;
        const std::vector<Chunk> chunks = data::chunks_of(numel);
        std::vector<double> values(chunks.size());
        const Span span = after.span(), weight_span = weights.span();
        set->add_penalty(&span, &weight_span, chunks.data(), static_cast<int64_t>(chunks.size()), l1, l2,
                         values.data());
        long double value = 0;
        for (int64_t i = 0; i < numel; ++i) {
          const double w = weights[i], sign = (w > 0) - (w < 0);
          value += static_cast<long double>(l1) * std::fabs(w) + static_cast<long double>(l2) * w * w;
          // As the design of every write: computed in double, rounded once (halves by way of float32).
          const double sum = before[i] + (l1 * sign + 2 * l2 * w);
          double expected = sum;
          if (dtype == DType::kFloat32) expected = static_cast<float>(sum);
          if (data::bytes(dtype) == 2) {
            expected = data::half_value(dtype, data::nearest_half(dtype, static_cast<float>(sum)));
          }
          CHECK_EQUAL_IN(context(set, after), after[i], expected);
        }
        const double total = fold(values.data(), static_cast<int64_t>(values.size()));
        CHECK(std::fabs(total - static_cast<double>(value)) <= 1e-12 * static_cast<double>(value));
        CHECK(weights.same_bits(weights_before));
      }
    }
  }
}

TEST(every_instruction_set_gives_the_same_bits) {
  const cpu::Kernels* const portable = sets().back();
  for (const cpu::Kernels* set : sets()) {
    for (const DType dtype : data::kDTypes) {
      for (const int64_t numel : sizes()) {
        for (const bool with_nonfinite : {false, true}) {
          Gradient one = with_nonfinite ? data::mixed(dtype, numel, 1, 9) : data::finite(dtype, numel, 1, 9);
          Gradient other = one;
          CHECK(data::same_bits(measure(set, one), measure(portable, other)));
          for (const NonFinite word : kWords) {
            const Action action = {0.3, round_to(dtype, 1.0), word};
            apply(set, one, action);
            apply(portable, other, action);
            CHECK(one.same_bits(other));
          }
        }
      }
    }
  }
}

}  // namespace
