#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "../cpu/kernels.h"
#include "work.h"

namespace gradkern::bindings {
namespace {

struct Measured {
  at::Tensor rows, total;
  const Stats* row;  // of each tensor, inside `rows`
  const Stats* sum;  // inside `total`
};

/// Runs `kernel(begin, end, partials)` over all chunks and folds what it found.
template <class Kernel>
Measured measure_with(const Work& work, const Kernel& kernel) {
  const int64_t tensors = static_cast<int64_t>(work.spans.size());
  const at::TensorOptions options = at::TensorOptions().dtype(at::kDouble);
  Measured found{at::empty({tensors, kColumns}, options), at::empty({kColumns}, options), nullptr, nullptr};
  Stats* const rows = static_cast<Stats*>(found.rows.data_ptr());
  Stats* const total = static_cast<Stats*>(found.total.data_ptr());
  std::vector<Stats> partials(work.chunks.size());
  for_ranges(static_cast<int64_t>(work.chunks.size()), work.numel,
             [&](int64_t begin, int64_t end) { kernel(begin, end, partials.data()); });
  for (int64_t i = 0; i < tensors; ++i) {
    const int64_t first = work.first_chunk[i];
    rows[i] = fold(partials.data() + first, work.first_chunk[i + 1] - first);
  }
  *total = fold(rows, tensors);
  found.row = rows;
  found.sum = total;
  return found;
}

Measured measure_work(const Work& work) {
  const cpu::Kernels& kernels = cpu::kernels();
  return measure_with(work, [&](int64_t begin, int64_t end, Stats* partials) {
    kernels.measure(work.spans.data(), work.chunks.data() + begin, end - begin, partials + begin);
  });
}

/// Writes the tensors that `actions` change, as far as `rows` (may be null) can tell.
void apply_work(at::TensorList grads, const Work& work, const Stats* rows, std::vector<Action>& actions) {
  std::vector<Chunk> chunks;
  std::vector<bool> written(actions.size(), false);
  int64_t numel = 0;
  // Backwards: the end of the list was read last, and is still in cache.
  for (size_t i = actions.size(); i-- > 0;) {
    Stats unknown;
    unknown.abs_max = unknown.nan_count = unknown.inf_count = INFINITY;
    if (work.spans[i].numel == 0 || !changes(actions[i], rows != nullptr ? rows[i] : unknown)) continue;
    // Where every element is finite the three words mean the same, and this one needs no test.
    if (rows != nullptr && all_finite(rows[i])) actions[i].nonfinite = NonFinite::kPropagate;
    written[i] = true;
    numel += work.spans[i].numel;
    for (int64_t k = work.first_chunk[i + 1]; k-- > work.first_chunk[i];) chunks.push_back(work.chunks[k]);
  }
  const cpu::Kernels& kernels = cpu::kernels();
  for_ranges(static_cast<int64_t>(chunks.size()), numel, [&](int64_t begin, int64_t end) {
    kernels.apply(work.spans.data(), chunks.data() + begin, end - begin, actions.data());
  });
  for (size_t i = 0; i < actions.size(); ++i) {
    if (written[i]) mark_written(grads[i]);
  }
}

/// One action per tensor; its coefficient is `coef[i * coef_stride]`.
std::vector<Action> actions_for(const Work& work, const double* coef, int64_t coef_stride, double clip_value,
                                NonFinite nonfinite) {
  std::vector<Action> actions(work.spans.size());
  for (size_t i = 0; i < actions.size(); ++i) {
    actions[i] = {coef[static_cast<int64_t>(i) * coef_stride], round_to(work.spans[i].dtype, clip_value),
                  nonfinite};
  }
  return actions;
}

std::tuple<at::Tensor, at::Tensor> measure_cpu(at::TensorList grads) {
  Measured found = measure_work(Work(grads));
  return {std::move(found.rows), std::move(found.total)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> clip_cpu(at::TensorList grads, double max_norm,
                                                        const std::optional<at::Tensor>& limit, double eps,
                                                        double clip_value, std::string_view nonfinite_word) {
  const NonFinite nonfinite = parse_nonfinite(nonfinite_word);
  if (limit.has_value()) max_norm = limit->item<double>();
  const Work work(grads);
  at::Tensor coef_tensor = at::empty({}, at::TensorOptions().dtype(at::kDouble));
  double& coef = *static_cast<double*>(coef_tensor.data_ptr());
  coef = 1;

  if (max_norm == INFINITY && (clip_value < INFINITY || nonfinite == NonFinite::kZero)) {
    const std::vector<Action> actions = actions_for(work, &coef, 0, clip_value, nonfinite);
    const cpu::Kernels& kernels = cpu::kernels();
    Measured found = measure_with(work, [&](int64_t begin, int64_t end, Stats* partials) {
      kernels.clamp(work.spans.data(), work.chunks.data() + begin, end - begin, actions.data(),
                    partials + begin);
    });
    for (size_t i = 0; i < actions.size(); ++i) {
      if (changes(actions[i], found.row[i])) mark_written(grads[i]);
    }
    return {std::move(found.rows), std::move(found.total), std::move(coef_tensor)};
  }

  Measured found = measure_work(work);
  coef = clip_coef(*found.sum, max_norm, eps, nonfinite);
  std::vector<Action> actions = actions_for(work, &coef, 0, clip_value, nonfinite);
  apply_work(grads, work, found.row, actions);
  return {std::move(found.rows), std::move(found.total), std::move(coef_tensor)};
}

void apply_cpu(at::TensorList grads, const std::optional<at::Tensor>& rows, const at::Tensor& coef,
               double clip_value, std::string_view nonfinite) {
  check_coef(coef, rows, static_cast<int64_t>(grads.size()));
  const Work work(grads);
  const at::Tensor flat = coef.contiguous();
  const at::Tensor seen = rows.has_value() ? rows->contiguous() : at::Tensor();
  std::vector<Action> actions = actions_for(work, flat.const_data_ptr<double>(), coef.dim() == 0 ? 0 : 1,
                                            clip_value, parse_nonfinite(nonfinite));
  apply_work(grads, work, seen.defined() ? static_cast<const Stats*>(seen.const_data_ptr()) : nullptr,
             actions);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> measure(at::TensorList grads) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gradkern::measure", "")
                             .typed<std::tuple<at::Tensor, at::Tensor>(at::TensorList)>();
  return op.call(grads);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> clip_(at::TensorList grads, double max_norm,
                                                     const std::optional<at::Tensor>& limit, double eps,
                                                     double clip_value, std::string_view nonfinite) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("gradkern::clip_", "")
          .typed<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
              at::TensorList, double, const std::optional<at::Tensor>&, double, double, std::string_view)>();
  return op.call(grads, max_norm, limit, eps, clip_value, nonfinite);
}

void apply_(at::TensorList grads, const std::optional<at::Tensor>& rows, const at::Tensor& coef,
            double clip_value, std::string_view nonfinite) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gradkern::apply_", "")
                             .typed<void(at::TensorList, const std::optional<at::Tensor>&, const at::Tensor&,
                                         double, std::string_view)>();
  op.call(grads, rows, coef, clip_value, nonfinite);
}

at::Tensor fold_rows(const at::Tensor& rows) {
  TORCH_CHECK(rows.device().is_cpu() && rows.scalar_type() == at::kDouble && rows.dim() == 2 &&
                  rows.size(1) == kColumns && rows.is_contiguous(),
              "gradkern: fold needs rows as measure returns them, float64 [tensors, ", kColumns,
              "] on the CPU");
  at::Tensor total = at::empty({kColumns}, rows.options());
  *static_cast<Stats*>(total.data_ptr()) =
      fold(static_cast<const Stats*>(rows.const_data_ptr()), rows.size(0));
  return total;
}

double measure_sum_sq(at::TensorList grads) {
  const Work work(grads);
  const cpu::Kernels& kernels = cpu::kernels();
  const Measured found = measure_with(work, [&](int64_t begin, int64_t end, Stats* partials) {
    kernels.measure_sum_sq(work.spans.data(), work.chunks.data() + begin, end - begin, partials + begin);
  });
  return found.sum->sum_sq;
}

int64_t read_pass(const at::Tensor& tensor) {
  typedef uint64_t Line __attribute__((vector_size(64), aligned(8)));
  constexpr int64_t kPieceLines = 1 << 12;
  const Line* const lines = static_cast<const Line*>(tensor.const_data_ptr());
  const int64_t count = static_cast<int64_t>(tensor.nbytes()) / 64;
  std::atomic<uint64_t> mixed{0};
  for_ranges((count + kPieceLines - 1) / kPieceLines, tensor.numel(), [&](int64_t begin, int64_t end) {
    Line mix[2] = {};
    const int64_t last = std::min(end * kPieceLines, count);
    for (int64_t i = begin * kPieceLines; i < last; ++i) {
      __builtin_prefetch(lines + i + 64);
      mix[i % 2] ^= lines[i];
    }
    for (int word = 0; word < 8; ++word) mixed ^= mix[0][word] ^ mix[1][word];
  });
  return static_cast<int64_t>(mixed.load());
}

TORCH_LIBRARY(gradkern, library) {
  // `rows` is float64 [len(grads), 5], one Stats each; `total` [5] is their merge; `coef` is 0-dim float64.
  // Gradients are dense, on one device, of float32, float64, bfloat16 or float16, each in the list once.
  library.def("measure(Tensor[] grads) -> (Tensor rows, Tensor total)");
  // element -> clamp(element * coef, -clip_value, clip_value), with
  // coef = min(1, max_norm / (norm + eps)) and `limit`, if given, in the place of max_norm.
  library.def(
      "clip_(Tensor(a!)[] grads, float max_norm, Tensor? limit, float eps, float clip_value, str nonfinite)"
      " -> (Tensor rows, Tensor total, Tensor coef)");
  // The same with coefficients given, one or one per gradient. `rows` spares what does not change.
  library.def("apply_(Tensor(a!)[] grads, Tensor? rows, Tensor coef, float clip_value, str nonfinite) -> ()");

  // A unit is a slice along dim 0 of a tensor with two or more dimensions, and the whole of any other. Units
  // of all tensors are numbered one after the other.
  // `sum_sq`, float64 [units], covers the finite elements.
  library.def("unit_sums(Tensor[] tensors) -> Tensor sum_sq");
  // As apply_, with a coefficient for each unit, float64 [units].
  library.def("apply_units_(Tensor(a!)[] grads, Tensor coef, float clip_value, str nonfinite) -> ()");
  // int64 [len(grads), 64], columns as in core/exponents.h.
  library.def("exponents(Tensor[] grads) -> Tensor counts");
  // Adds the gradient of l1 * sum(abs(weight)) + l2 * sum(weight ** 2), whose value of each tensor it
  // returns, float64 [len(grads)]. Gradients and weights are alike in shape, dtype and layout.
  library.def("add_penalty_(Tensor(a!)[] grads, Tensor[] weights, float l1, float l2) -> Tensor values");
}

TORCH_LIBRARY_IMPL(gradkern, CPU, library) {
  library.impl("measure", measure_cpu);
  library.impl("clip_", clip_cpu);
  library.impl("apply_", apply_cpu);
}

// Nothing here is differentiable: gradients of gradients pass these operators by.
TORCH_LIBRARY_IMPL(gradkern, Autograd, library) {
  library.impl("measure", torch::CppFunction::makeFallthrough());
  library.impl("clip_", torch::CppFunction::makeFallthrough());
  library.impl("apply_", torch::CppFunction::makeFallthrough());
  library.impl("unit_sums", torch::CppFunction::makeFallthrough());
  library.impl("apply_units_", torch::CppFunction::makeFallthrough());
  library.impl("exponents", torch::CppFunction::makeFallthrough());
  library.impl("add_penalty_", torch::CppFunction::makeFallthrough());
}

}  // namespace gradkern::bindings
