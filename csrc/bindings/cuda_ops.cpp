#include "cuda_ops.h"

#include <torch/csrc/utils/pybind.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <type_traits>

#include "../core/exponents.h"
#include "../cuda/launch.h"
#include "work.h"

/// The operators on CUDA tensors. Neither CUDA's headers nor torch's CUDA library take part: the launch code
/// has the former, and of the latter the current stream and memory are reached through c10's device-neutral
/// interfaces. So this compiles, links and loads beside a torch that was built for the CPU alone.

namespace gradkern::bindings {
namespace {

template <class Stream, class = void>
struct HasNativeHandle : std::false_type {};
template <class Stream>
struct HasNativeHandle<Stream, std::void_t<decltype(std::declval<const Stream&>().native_handle())>>
    : std::true_type {};

/// A stream of torch's as a `cudaStream_t`. From torch 2.11 on the stream itself tells; before, only the
/// current one can be had, from torch's Python module, without linking torch's CUDA library.
template <class Stream>
void* native_handle(const Stream& current) {
  if constexpr (HasNativeHandle<Stream>::value) {
    return current.native_handle();
  } else {
    const pybind11::gil_scoped_acquire locked;
    const pybind11::object ask = pybind11::module_::import("torch._C").attr("_cuda_getCurrentRawStream");
    return reinterpret_cast<void*>(ask(int{current.device_index()}).template cast<uintptr_t>());
  }
}

/// Memory of torch's caching allocator, which under stream capture is the graph's.
cuda::Block allocate(c10::Device device, size_t bytes, const std::string& what) {
  try {
    const at::Tensor memory =
        at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions().dtype(at::kByte).device(device));
    return cuda::Block(memory.data_ptr(), [memory](void*) {});
  } catch (c10::Error& error) {  // it stays the torch.OutOfMemoryError that it most likely is
    error.add_context("gradkern: allocating " + std::to_string(bytes) + " bytes for " + what);
    throw;
  }
}

/// The list of one call, checked, and where to launch.
struct CudaWork {
  explicit CudaWork(at::TensorList grads) : device(grads[0].device()), guard(device) {
    tensors.spans.reserve(grads.size());
    for (const at::Tensor& grad : grads) {
      TORCH_CHECK(grad.device() == device, "gradkern: gradients on ", device, " and ", grad.device(),
                  " need a call each; gradkern.measure and gradkern.clip_ make them");
      tensors.spans.push_back(describe(grad));
    }
  }

  void cut_by_units(at::TensorList grads) {
    tensors.units.emplace();
    for (const at::Tensor& grad : grads) {
      tensors.units->push_back(units_of(grad, unit_count));
      unit_count += tensors.units->back().count;
    }
  }

  cuda::Target target() const {
    const c10::impl::VirtualGuardImpl torch(c10::DeviceType::CUDA);
    return {
        device.index(), native_handle(torch.getStream(device)),
        [device = device](size_t bytes, const std::string& what) { return allocate(device, bytes, what); }};
  }

  int64_t count() const { return static_cast<int64_t>(tensors.spans.size()); }
  at::TensorOptions doubles() const { return at::TensorOptions().dtype(at::kDouble).device(device); }

  c10::Device device;
  c10::DeviceGuard guard;
  cuda::Tensors tensors;
  int64_t unit_count = 0;
};

struct CudaMeasured {
  explicit CudaMeasured(const CudaWork& work)
      : rows(at::empty({work.count(), kColumns}, work.doubles())),
        total(at::empty({kColumns}, work.doubles())) {
    finish.rows = static_cast<Stats*>(rows.data_ptr());
    finish.total = static_cast<Stats*>(total.data_ptr());
  }
  at::Tensor rows, total;
  cuda::Finish finish;
};

/// Numbers that a kernel reads, as float64: the very tensor, or a copy made on the device.
at::Tensor on_device(const at::Tensor& numbers, const CudaWork& work, const char* name) {
  TORCH_CHECK(numbers.device() == work.device, "gradkern: ", name, " must be on ", work.device,
              " as the gradients are, got ", numbers.device());
  return numbers.to(at::kDouble).contiguous();
}

/// Counts writes: whether one happened only the device knows.
void mark_all_written(at::TensorList grads) {
  for (const at::Tensor& grad : grads) mark_written(grad);
}

std::tuple<at::Tensor, at::Tensor> measure_cuda(at::TensorList grads) {
  const CudaWork work(grads);
  CudaMeasured found(work);
  cuda::Launch(work.target(), work.tensors).stats(found.finish);
  return {std::move(found.rows), std::move(found.total)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> clip_cuda(at::TensorList grads, double max_norm,
                                                         const std::optional<at::Tensor>& limit, double eps,
                                                         double clip_value, std::string_view nonfinite_word) {
  const NonFinite nonfinite = parse_nonfinite(nonfinite_word);
  const CudaWork work(grads);
  CudaMeasured found(work);
  at::Tensor coef = at::empty({}, work.doubles());
  at::Tensor limit_there;
  if (limit.has_value() && limit->is_cpu()) {
    max_norm = limit->item<double>();
  } else if (limit.has_value()) {
    limit_there = on_device(*limit, work, "limit");
    found.finish.limit = limit_there.const_data_ptr<double>();
  }
  found.finish.coef = coef.data_ptr<double>();
  found.finish.max_norm = max_norm;
  found.finish.eps = eps;
  found.finish.nonfinite = nonfinite;

  const bool by_norm = limit_there.defined() || max_norm != INFINITY;
  const bool by_value = clip_value < INFINITY || nonfinite == NonFinite::kZero;
  {
    cuda::Launch launch(work.target(), work.tensors);
    if (by_value && !by_norm) {
      launch.value(found.finish, clip_value);
    } else {
      launch.stats(found.finish);
    }
    if (by_norm) {
      launch.apply(found.finish.coef, cuda::CoefScope::kGlobal, found.finish.rows, clip_value, nonfinite);
    }
  }
  if (by_norm || by_value) mark_all_written(grads);
  return {std::move(found.rows), std::move(found.total), std::move(coef)};
}

void apply_cuda(at::TensorList grads, const std::optional<at::Tensor>& rows, const at::Tensor& coef,
                double clip_value, std::string_view nonfinite) {
  const CudaWork work(grads);
  check_coef(coef, rows, work.count());
  const at::Tensor coefs = on_device(coef, work, "coef");
  const at::Tensor seen = rows.has_value() ? on_device(*rows, work, "rows") : at::Tensor();
  cuda::Launch(work.target(), work.tensors)
      .apply(coefs.const_data_ptr<double>(),
             coef.dim() == 0 ? cuda::CoefScope::kGlobal : cuda::CoefScope::kTensor,
             seen.defined() ? static_cast<const Stats*>(seen.const_data_ptr()) : nullptr, clip_value,
             parse_nonfinite(nonfinite));
  mark_all_written(grads);
}

at::Tensor unit_sums_cuda(at::TensorList tensors) {
  CudaWork work(tensors);
  work.cut_by_units(tensors);
  at::Tensor sum_sq = at::zeros({work.unit_count}, work.doubles());  // for units without elements
  cuda::Launch(work.target(), work.tensors).unit_sums(sum_sq.data_ptr<double>());
  return sum_sq;
}

void apply_units_cuda(at::TensorList grads, const at::Tensor& coef, double clip_value,
                      std::string_view nonfinite) {
  CudaWork work(grads);
  work.cut_by_units(grads);
  check_unit_coef(coef, work.unit_count);
  const at::Tensor coefs = on_device(coef, work, "coef");
  cuda::Launch(work.target(), work.tensors)
      .apply(coefs.const_data_ptr<double>(), cuda::CoefScope::kUnit, nullptr, clip_value,
             parse_nonfinite(nonfinite));
  mark_all_written(grads);
}

at::Tensor exponents_cuda(at::TensorList grads) {
  const CudaWork work(grads);
  at::Tensor counts = at::zeros({work.count(), kExponentColumns}, work.doubles().dtype(at::kLong));
  cuda::Launch(work.target(), work.tensors).exponents(counts.data_ptr<int64_t>());
  return counts;
}

at::Tensor add_penalty_cuda(at::TensorList grads, at::TensorList weights, double l1, double l2) {
  check_pairs(grads, weights);
  CudaWork work(grads);
  for (const at::Tensor& weight : weights) {
    TORCH_CHECK(weight.device() == work.device, "gradkern: a weight is on ", weight.device(),
                ", its gradient on ", work.device);
    work.tensors.weights.push_back(describe(weight).data);
  }
  at::Tensor values = at::zeros({work.count()}, work.doubles());  // for empty tensors
  cuda::Launch(work.target(), work.tensors).penalty(l1, l2, values.data_ptr<double>());
  mark_all_written(grads);
  return values;
}

}  // namespace

std::optional<std::string> cuda_compiled_for() { return cuda::compiled_for(); }

std::string cuda_problem(int device) {
  try {
    return cuda::problem(device);
  } catch (const cuda::Error& error) {
    return error.what();
  }
}

bool cuda_usable(int device) {
  enum : char { kUnknown, kYes, kNo };
  static std::array<std::atomic<char>, 64> known{};
  if (device < 0 || device >= static_cast<int>(known.size())) return false;
  if (known[device] == kUnknown) known[device] = cuda_problem(device).empty() ? kYes : kNo;
  return known[device] == kYes;
}

std::string stream_route() {
  return HasNativeHandle<c10::Stream>::value ? "c10::Stream::native_handle"
                                             : "torch._C._cuda_getCurrentRawStream";
}

TORCH_LIBRARY_IMPL(gradkern, CUDA, library) {
  library.impl("measure", measure_cuda);
  library.impl("clip_", clip_cuda);
  library.impl("apply_", apply_cuda);
  library.impl("unit_sums", unit_sums_cuda);
  library.impl("apply_units_", apply_units_cuda);
  library.impl("exponents", exponents_cuda);
  library.impl("add_penalty_", add_penalty_cuda);
}

}  // namespace gradkern::bindings
