#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../core/exponents.h"
#include "../cpu/exponents.h"
#include "../cpu/kernels.h"
#include "work.h"

/// Operators that look at more than whole tensors: at their units, their exponents, their weights.

namespace gradkern::bindings {
namespace {

/// The units of a list of tensors, cut into ranges of about a chunk.
struct UnitWork {
  explicit UnitWork(at::TensorList tensors) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const at::Tensor& tensor = tensors[i];
      spans.push_back(describe(tensor));
      const Units of = units_of(tensor, unit_count);
      unit_count += of.count;
      numel += tensor.numel();
      const int64_t step = units_per_range(of);
      for (int64_t begin = 0; begin < of.count; begin += step) {
        ranges.push_back({begin, std::min(begin + step, of.count), static_cast<int32_t>(i)});
      }
      units.push_back(of);
    }
  }

  /// Calls `run(ranges, count)` on torch's threads.
  template <class Run>
  void for_all(const Run& run) const {
    for_ranges(static_cast<int64_t>(ranges.size()), numel,
               [&](int64_t begin, int64_t end) { run(ranges.data() + begin, end - begin); });
  }

  std::vector<Span> spans;
  std::vector<Units> units;
  std::vector<UnitRange> ranges;
  int64_t unit_count = 0;
  int64_t numel = 0;
};

at::Tensor unit_sums_cpu(at::TensorList tensors) {
  const UnitWork work(tensors);
  at::Tensor sum_sq = at::empty({work.unit_count}, at::TensorOptions().dtype(at::kDouble));
  double* const out = sum_sq.data_ptr<double>();
  work.for_all([&](const UnitRange* ranges, int64_t count) {
    cpu::kernels().unit_sums(work.spans.data(), work.units.data(), ranges, count, out);
  });
  return sum_sq;
}

void apply_units_cpu(at::TensorList grads, const at::Tensor& coef, double clip_value, std::string_view word) {
  const UnitWork work(grads);
  check_unit_coef(coef, work.unit_count);
  const NonFinite nonfinite = parse_nonfinite(word);
  const at::Tensor flat = coef.contiguous();
  const double* const coefs = flat.const_data_ptr<double>();
  std::vector<Action> actions(grads.size());
  for (size_t i = 0; i < actions.size(); ++i) {
    actions[i] = {1, round_to(work.spans[i].dtype, clip_value), nonfinite};
  }
  work.for_all([&](const UnitRange* ranges, int64_t count) {
    cpu::kernels().apply_units(work.spans.data(), work.units.data(), ranges, count, actions.data(), coefs);
  });
  for (size_t i = 0; i < actions.size(); ++i) {
    if (work.spans[i].numel == 0) continue;
    const double* const first = coefs + work.units[i].first;
    const bool scaled =
        std::any_of(first, first + work.units[i].count, [](double unit) { return unit != 1; });
    if (scaled || clip_value < INFINITY || nonfinite == NonFinite::kZero) mark_written(grads[i]);
  }
}

at::Tensor exponents_cpu(at::TensorList grads) {
  const Work work(grads);
  at::Tensor counts =
      at::zeros({static_cast<int64_t>(grads.size()), kExponentColumns}, at::TensorOptions().dtype(at::kLong));
  int64_t* const out = counts.data_ptr<int64_t>();
  for_ranges(static_cast<int64_t>(work.chunks.size()), work.numel, [&](int64_t begin, int64_t end) {
    cpu::count_exponents(work.spans.data(), work.chunks.data() + begin, end - begin, out);
  });
  return counts;
}

at::Tensor add_penalty_cpu(at::TensorList grads, at::TensorList weights, double l1, double l2) {
  check_pairs(grads, weights);
  const Work work(grads), read(weights);
  at::Tensor values = at::empty({static_cast<int64_t>(grads.size())}, at::TensorOptions().dtype(at::kDouble));
  std::vector<double> partials(work.chunks.size());
  for_ranges(static_cast<int64_t>(work.chunks.size()), work.numel, [&](int64_t begin, int64_t end) {
    cpu::kernels().add_penalty(work.spans.data(), read.spans.data(), work.chunks.data() + begin, end - begin,
                               l1, l2, partials.data() + begin);
  });
  double* const out = values.data_ptr<double>();
  for (size_t i = 0; i < grads.size(); ++i) {
    const int64_t first = work.first_chunk[i];
    out[i] = fold(partials.data() + first, work.first_chunk[i + 1] - first);
    if (work.spans[i].numel > 0) mark_written(grads[i]);
  }
  return values;
}

}  // namespace

TORCH_LIBRARY_IMPL(gradkern, CPU, library) {
  library.impl("unit_sums", unit_sums_cpu);
  library.impl("apply_units_", apply_units_cpu);
  library.impl("exponents", exponents_cpu);
  library.impl("add_penalty_", add_penalty_cpu);
}

}  // namespace gradkern::bindings
