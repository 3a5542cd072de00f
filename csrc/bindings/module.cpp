#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <ATen/core/LegacyTypeDispatch.h>

#include <vector>

#include "../cpu/kernels.h"
#include "cuda_ops.h"
#include "ops.h"

/// The fast path from a Python list to an operator: no Python object per gradient, and no message either.
/// Whatever is not the plain case is left, untouched, to the general path in Python, which serves it or
/// says by name what is wrong.

namespace py = pybind11;

namespace gradkern::bindings {
namespace {

/// Pointers seen so far, by open addressing: a tied parameter must be counted and scaled once.
class SeenPointers {
 public:
  explicit SeenPointers(size_t most) {
    size_t size = 16;
    while (size < 2 * most) size *= 2;
    slots_.resize(size, nullptr);
  }

  /// True the first time.
  bool insert(const void* pointer) {
    const size_t mask = slots_.size() - 1;
    // Tensors are allocated at multiples of 16; the multiplication spreads what is left.
    size_t slot = (reinterpret_cast<uintptr_t>(pointer) >> 4) * 0x9e3779b97f4a7c15u >> 20 & mask;
    while (slots_[slot] != nullptr) {
      if (slots_[slot] == pointer) return false;
      slot = (slot + 1) & mask;
    }
    slots_[slot] = pointer;
    return true;
  }

 private:
  std::vector<const void*> slots_;
};

/// A plain dense tensor of a device that has kernels, without any wrapper, mode bit or lazy view between us
/// and its memory.
bool is_plain(const at::Tensor& grad) {
  constexpr c10::DispatchKeySet kHarmless =
      c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset;
  const c10::DispatchKeySet keys = grad.key_set() - kHarmless;
  if (keys == c10::DispatchKeySet(c10::DispatchKey::CUDA)) {
    if (!cuda_usable(grad.device().index())) return false;
  } else if (keys != c10::DispatchKeySet(c10::DispatchKey::CPU)) {
    return false;
  }
  switch (grad.scalar_type()) {
    case at::kFloat:
    case at::kDouble:
    case at::kBFloat16:
    case at::kHalf: return grad.is_non_overlapping_and_dense();
    default: return false;
  }
}

/// The tensor in a list item: the item, or the second of a (name, tensor) pair. Null for anything else.
PyObject* tensor_of(PyObject* item) {
  if (PyTuple_CheckExact(item) && PyTuple_GET_SIZE(item) == 2 && PyUnicode_Check(PyTuple_GET_ITEM(item, 0))) {
    item = PyTuple_GET_ITEM(item, 1);
  }
  return THPVariable_CheckExact(item) ? item : nullptr;
}

/// The gradients behind a list. They are owned: another thread may set `.grad` to None meanwhile.
struct Walked {
  std::vector<at::Tensor> grads;
  std::vector<int64_t> present;  // the item each gradient came from
  int64_t numel = 0;

  /// False, at the first item that is not the plain case; nor is a list without a single gradient, for
  /// which the dispatcher would find no kernel.
  bool walk(const py::list& items, bool items_are_grads) {
    const size_t count = items.size();
    grads.reserve(count);
    present.reserve(count);
    SeenPointers seen(count);
    for (size_t i = 0; i < count; ++i) {
      PyObject* const tensor = tensor_of(PyList_GET_ITEM(items.ptr(), static_cast<Py_ssize_t>(i)));
      if (tensor == nullptr) return false;
      const at::Tensor& variable = THPVariable_Unpack(tensor);
      const at::Tensor& grad = items_are_grads ? variable : variable.grad();
      if (!grad.defined()) continue;
      if (!is_plain(grad) || (!grads.empty() && grad.device() != grads[0].device())) return false;
      if (!seen.insert(grad.unsafeGetTensorImpl())) continue;
      numel += grad.numel();
      grads.push_back(grad);
      present.push_back(static_cast<int64_t>(i));
    }
    return !grads.empty();
  }

  /// Indices of the items that gave a row, or None where all of them did.
  py::object present_or_none(const py::list& items) const {
    if (present.size() == items.size()) return py::none();
    return py::cast(present);
  }
};

/// Whether an operator can take `number` beside the gradients. The dispatcher looks at all of its arguments:
/// one from another device would choose that device's kernel, a meta tensor the one that computes nothing.
bool is_beside(const at::Tensor& number, const Walked& walked) {
  return number.device() == walked.grads[0].device();
}

/// Calls `op` below autograd, and without the interpreter's lock where that is worth its price. On CUDA it is
/// a must: the launch code has a lock of its own, and torch's allocator may want the interpreter's inside it.
template <class Op>
auto call(const Walked& walked, const Op& op) {
  constexpr int64_t kHoldLockNumel = int64_t{1} << 15;
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (walked.numel <= kHoldLockNumel && walked.grads[0].is_cpu()) return op();
  py::gil_scoped_release unlocked;
  return op();
}

py::object measure_items(const py::list& items, bool items_are_grads) {
  Walked walked;
  if (!walked.walk(items, items_are_grads)) return py::none();
  auto [rows, total] = call(walked, [&] { return measure(walked.grads); });
  return py::make_tuple(std::move(rows), std::move(total), walked.present_or_none(items));
}

py::object clip_items_(const py::list& items, double max_norm, const std::optional<at::Tensor>& limit,
                       double eps, double clip_value, const std::string& nonfinite, bool items_are_grads) {
  Walked walked;
  if (!walked.walk(items, items_are_grads)) return py::none();
  if (limit.has_value() && !limit->is_cpu() && !is_beside(*limit, walked)) return py::none();
  auto [rows, total, coef] =
      call(walked, [&] { return clip_(walked.grads, max_norm, limit, eps, clip_value, nonfinite); });
  return py::make_tuple(std::move(rows), std::move(total), std::move(coef), walked.present_or_none(items));
}

/// False where an item is not the plain case; then nothing was touched.
bool apply_items_(const py::list& items, const std::optional<at::Tensor>& rows, const at::Tensor& coef,
                  double clip_value, const std::string& nonfinite, bool items_are_grads) {
  Walked walked;
  if (!walked.walk(items, items_are_grads)) return false;
  if (!is_beside(coef, walked) || (rows.has_value() && !is_beside(*rows, walked))) return false;
  call(walked, [&] { apply_(walked.grads, rows, coef, clip_value, nonfinite); });
  return true;
}

/// Whether a gradient is float64, which decides the dtype that torch returns norms in.
bool any_float64(const py::list& items, bool items_are_grads) {
  for (const py::handle item : items) {
    PyObject* const tensor = tensor_of(item.ptr());
    if (tensor == nullptr) continue;
    const at::Tensor& variable = THPVariable_Unpack(tensor);
    const at::Tensor& grad = items_are_grads ? variable : variable.grad();
    if (grad.defined() && grad.scalar_type() == at::kDouble) return true;
  }
  return false;
}

/// Whether what the lists and dicts `containers` hold, one after the other, is what `values` holds: the same
/// objects, for equal tensors are others. A module's parameters are followed at a few ns each.
bool is_unchanged(const py::list& containers, const py::list& values) {
  PyObject* const* known = PySequence_Fast_ITEMS(values.ptr());
  PyObject* const* const end = known + values.size();
  for (const py::handle container : containers) {
    if (PyDict_Check(container.ptr())) {
      PyObject* value = nullptr;
      for (Py_ssize_t position = 0; PyDict_Next(container.ptr(), &position, nullptr, &value);) {
        if (known == end || *known++ != value) return false;
      }
    } else {
      for (const py::handle value : py::reinterpret_borrow<py::list>(container)) {
        if (known == end || *known++ != value.ptr()) return false;
      }
    }
  }
  return known == end;
}

double measure_norm_only(const py::list& items) {
  Walked walked;
  if (!walked.walk(items, false) || !walked.grads[0].is_cpu()) {
    throw py::value_error("measure_norm_only: only plain CPU gradients");
  }
  const double sum_sq = call(walked, [&] { return measure_sum_sq(walked.grads); });
  return std::sqrt(sum_sq);
}

std::vector<std::string> isas() {
  const cpu::Kernels* sets[cpu::kMaxSets];
  const int count = cpu::available(sets);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(sets[i]->isa);
  return names;
}

void set_isa(const std::string& isa) {
  if (!cpu::select(isa.c_str())) {
    std::string names;
    for (const std::string& name : isas()) names += (names.empty() ? "" : ", ") + name;
    throw py::value_error("set_isa: '" + isa + "' is not available here; this build and machine offer " +
                          names);
  }
}

}  // namespace
}  // namespace gradkern::bindings

PYBIND11_MODULE(_C, module) {
  using namespace gradkern::bindings;
  module.def("measure", measure_items, py::arg("items"), py::arg("items_are_grads") = false);
  module.def("clip_", clip_items_, py::arg("items"), py::arg("max_norm"), py::arg("limit"), py::arg("eps"),
             py::arg("clip_value"), py::arg("nonfinite"), py::arg("items_are_grads") = false);
  module.def("apply_", apply_items_, py::arg("items"), py::arg("rows"), py::arg("coef"),
             py::arg("clip_value"), py::arg("nonfinite"), py::arg("items_are_grads") = false);
  module.def("any_float64", any_float64, py::arg("items"), py::arg("items_are_grads") = false);
  module.def("fold", fold_rows, py::arg("rows"));
  module.def("is_unchanged", is_unchanged, py::arg("containers"), py::arg("values"));
  module.def("isa", [] { return std::string(gradkern::cpu::kernels().isa); });
  module.def("isas", isas);
  module.def("set_isa", set_isa, py::arg("isa"));
  module.def("isa_problem", [] { return gradkern::cpu::selection_problem(); });
  module.def("cuda_compiled_for", cuda_compiled_for);
  module.def("cuda_problem", cuda_problem, py::arg("device"), py::call_guard<py::gil_scoped_release>());
  module.def("stream_route", stream_route);
  module.def("measure_norm_only", measure_norm_only, py::arg("items"));
  module.def("read_pass", read_pass, py::arg("tensor"));
  module.attr("torch_version") =
      std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR);
}
