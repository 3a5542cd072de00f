#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "../core/clip.h"
#include "../core/plan.h"
#include "../core/span.h"

/// From torch's tensors to what the CPU kernels take, and from one thread to torch's.

namespace gradkern::bindings {

inline DType dtype_of(const at::Tensor& grad) {
  switch (grad.scalar_type()) {
    case at::kFloat: return DType::kFloat32;
    case at::kDouble: return DType::kFloat64;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    default:
      TORCH_CHECK(false, "gradkern: a gradient of dtype ", grad.scalar_type(), " has no kernel; ",
                  "use gradkern.measure or gradkern.clip_, which serve it otherwise");
  }
}

inline Span describe(const at::Tensor& grad) {
  TORCH_CHECK(grad.layout() == at::kStrided && grad.is_non_overlapping_and_dense(),
              "gradkern: a gradient without a dense layout has no kernel; use gradkern.measure or ",
              "gradkern.clip_, which serve it otherwise");
  return {const_cast<void*>(grad.const_data_ptr()), grad.numel(), dtype_of(grad)};
}

/// A list of gradients as the kernels see it.
struct Work {
  explicit Work(at::TensorList grads) {
    spans.reserve(grads.size());
    first_chunk.reserve(grads.size() + 1);
    int64_t chunk_total = 0;
    for (const at::Tensor& grad : grads) {
      spans.push_back(describe(grad));
      first_chunk.push_back(chunk_total);
      chunk_total += chunk_count(spans.back().numel);
    }
    first_chunk.push_back(chunk_total);
    chunks.resize(chunk_total);
    Chunk* next = chunks.data();
    for (size_t i = 0; i < spans.size(); ++i) {
      next = plan(static_cast<int32_t>(i), spans[i].numel, next);
      numel += spans[i].numel;
    }
  }

  std::vector<Span> spans;
  std::vector<Chunk> chunks;
  std::vector<int64_t> first_chunk;  // of each tensor, and the end
  int64_t numel = 0;
};

/// Below this many elements waking another thread takes longer than the work.
constexpr int64_t kSerialNumel = int64_t{1} << 18;

/// Calls `run(begin, end)` for ranges that together cover `count` pieces of work with `numel` elements, on
/// torch's threads. Ranges are handed out as threads become free, since pieces differ in size and a core may
/// be busy elsewhere; results do not depend on it, for every piece writes to a place of its own.
template <class Run>
void for_ranges(int64_t count, int64_t numel, const Run& run) {
  const int64_t threads = at::get_num_threads();
  if (threads == 1 || count <= 1 || numel <= kSerialNumel) return run(0, count);

  constexpr int64_t kRangesPerThread = 16;  // the last one to finish keeps the others waiting 1/16 at most
  const int64_t step = std::max<int64_t>(1, count / (threads * kRangesPerThread));
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(step, std::memory_order_relaxed)) < count;) {
      run(begin, std::min(begin + step, count));
    }
  });
}

/// The units of a tensor, of which the first has that number.
inline Units units_of(const at::Tensor& tensor, int64_t first) {
  Units units;
  units.count = tensor.dim() > 1 ? tensor.size(0) : 1;
  units.numel = units.count > 0 ? tensor.numel() / units.count : 0;
  units.first = first;
  TORCH_CHECK(units.count <= 1 || units.numel == 0 || tensor.stride(0) == units.numel,
              "gradkern: the units of a tensor with sizes ", tensor.sizes(), " and strides ",
              tensor.strides(), " do not lie one behind the other, so they have no kernel");
  return units;
}

inline void check_coef(const at::Tensor& coef, const std::optional<at::Tensor>& rows, int64_t tensors) {
  TORCH_CHECK(coef.scalar_type() == at::kDouble && (coef.dim() == 0 || coef.numel() == tensors),
              "gradkern: apply_ needs float64 coefficients, one or one per gradient (", tensors, "), got ",
              coef.scalar_type(), " ", coef.sizes());
  TORCH_CHECK(
      !rows.has_value() || (rows->scalar_type() == at::kDouble && rows->numel() == tensors * kColumns),
      "gradkern: apply_ needs rows as measure returns them, float64 [", tensors, ", ", kColumns, "]");
}

inline void check_unit_coef(const at::Tensor& coef, int64_t units) {
  TORCH_CHECK(coef.scalar_type() == at::kDouble && coef.numel() == units,
              "gradkern: apply_units_ needs a float64 coefficient for each of ", units, " units, got ",
              coef.scalar_type(), " ", coef.sizes());
}

inline void check_pairs(at::TensorList grads, at::TensorList weights) {
  TORCH_CHECK(grads.size() == weights.size(), "gradkern: add_penalty_ needs one weight for each of ",
              grads.size(), " gradients, got ", weights.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    TORCH_CHECK(grads[i].sizes() == weights[i].sizes() && grads[i].strides() == weights[i].strides() &&
                    grads[i].scalar_type() == weights[i].scalar_type(),
                "gradkern: gradient ", i,
                " and its weight differ in shape, layout or dtype, so they have no kernel");
  }
}

/// torch's own in-place operators count a write even where it changes nothing; we count those that happened.
inline void mark_written(const at::Tensor& grad) {
  if (!grad.is_inference()) grad.unsafeGetTensorImpl()->bump_version();
}

inline NonFinite parse_nonfinite(std::string_view word) {
  if (word == "keep") return NonFinite::kKeep;
  if (word == "zero") return NonFinite::kZero;
  if (word == "propagate") return NonFinite::kPropagate;
  TORCH_CHECK(false, "gradkern: nonfinite must be 'keep', 'zero' or 'propagate', got '", std::string(word),
              "'");
}

}  // namespace gradkern::bindings
