// The CUDA bindings, together with a device "cuda" for a torch that has none: its memory is the host's, its
// runtime the stand-in of ../runtime. One translation unit, for torch's headers take most of the time.

#include "bindings/cuda_ops.cpp"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/tensor.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>
#include <map>

#include "runtime.h"

namespace py = pybind11;

void runtime::report(const std::string& what) { throw std::runtime_error("stand-in: " + what); }

namespace {

/// torch's current device and current streams.
struct Current {
  c10::DeviceIndex device = 0;
  std::map<c10::DeviceIndex, cudaStream_t> streams;
};
Current& current() {
  static Current all;
  return all;
}
cudaStream_t stream_of(c10::DeviceIndex device) {
  cudaStream_t& stream = current().streams[device];
  if (stream == nullptr) stream = runtime::new_stream(device);
  return stream;
}

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {c10::DeviceType::CUDA, current().device}; }
  void setDevice(c10::Device device) const override { current().device = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { setDevice(device); }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, device,
                       reinterpret_cast<c10::StreamId>(stream_of(device.index())));
  }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 2; }
  void* getStreamNativeHandle(const c10::Stream stream) const override {
    return reinterpret_cast<void*>(stream.id());
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

at::Tensor wrap(void* data, at::IntArrayRef sizes, at::IntArrayRef strides,
                std::function<void(void*)> deleter, at::TensorOptions options, c10::Device device) {
  return at::for_blob(data, sizes)
      .strides(strides)
      .deleter(std::move(deleter))
      .options(options.device(device))
      .target_device(device)
      .make_tensor();
}

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype,
                         c10::Device device) {
  int64_t numel = 1;
  for (const int64_t size : sizes) numel *= size;
  const auto bytes = static_cast<size_t>(std::max<int64_t>(numel, 1)) * c10::elementSize(dtype);
  runtime::Block block = runtime::target(stream_of(device.index())).allocate(bytes, "");
  TORCH_CHECK_WITH(OutOfMemoryError, block != nullptr, "the fake device is full");
  void* const data = block.get();
  return wrap(data, sizes, strides, [block](void*) {}, at::TensorOptions().dtype(dtype), device);
}

at::Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<c10::Device> device, std::optional<bool>, std::optional<at::MemoryFormat>) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return empty_strided(sizes, strides, dtype.value_or(at::kFloat), device.value());
}

at::Tensor& zero_(at::Tensor& tensor) {
  runtime::run(stream_of(tensor.device().index()));  // what may still use this memory
  memset(tensor.data_ptr(), 0, tensor.nbytes());
  return tensor;
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("zero_", zero_);
}

/// A copy on the device, with the same strides.
at::Tensor upload(const at::Tensor& host, int device) {
  const c10::Device there(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
  at::Tensor copy = empty_strided(host.sizes(), host.strides(), host.scalar_type(), there);
  memcpy(copy.data_ptr(), host.data_ptr(), host.nbytes());
  return copy;
}

/// A view of the device's memory as it is now.
at::Tensor view(const at::Tensor& there) {
  return wrap(
      there.data_ptr(), there.sizes(), there.strides(), [there](void*) {},
      at::TensorOptions().dtype(there.scalar_type()), c10::Device(c10::DeviceType::CPU));
}

/// A stream as torch had them before 2.11.
struct OldStream {
  c10::DeviceIndex index;
  c10::DeviceIndex device_index() const { return index; }
};
uintptr_t old_route(int device) {
  const OldStream stream{static_cast<c10::DeviceIndex>(device)};
  return reinterpret_cast<uintptr_t>(gradkern::bindings::native_handle(stream));
}

cudaGraph_t graph = nullptr;

}  // namespace

PYBIND11_MODULE(_fake_device, module) {
  module.def("upload", upload, py::arg("host"), py::arg("device") = 0);
  module.def("view", view);
  module.def(
      "run", [](int device) { runtime::run(stream_of(static_cast<c10::DeviceIndex>(device))); },
      py::arg("device") = 0);
  module.def("new_stream", [](int device) {
    current().streams[static_cast<c10::DeviceIndex>(device)] = runtime::new_stream(device);
  });
  module.def("calls", [] { return runtime::calls(); });
  module.def("clear_calls", runtime::clear_calls);
  module.def("lend_at_most", [](int64_t bytes) {
    runtime::setting().device_bytes = 0;
    runtime::lendable() = bytes;
  });
  module.def("begin_capture", [] { runtime::begin_capture(stream_of(0)); });
  module.def("end_capture", [] { graph = runtime::end_capture(stream_of(0)); });
  module.def("replay", [] { runtime::replay(graph, stream_of(0)); });
  module.def("old_route", old_route);
  module.def("stream_route", gradkern::bindings::stream_route);
}
