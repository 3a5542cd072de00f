#include "launch.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>

namespace gradkern::cuda {
namespace {

#ifndef GRADKERN_CUDA_ARCHS
#error "GRADKERN_CUDA_ARCHS must name the architectures that the kernels are compiled for, as in 80,90"
#endif

/// Memory of the plan blocks that are kept on each device, at most, and of the smallest of them.
constexpr size_t kKeptBytes = size_t{64} << 20;
constexpr size_t kSmallestKept = size_t{1} << 14;

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  throw Error("gradkern: " + what + " failed: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) +
              ").");
}

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

/// Makes a device current, and the one before when it goes.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "finding the current CUDA device");
    if (before_ == device) return;
    check(cudaSetDevice(device), "changing to cuda:" + std::to_string(device));
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

/// Lets this thread allocate, query events and load kernels although some stream, perhaps of another
/// thread, is being captured: calls that CUDA else refuses, ending that capture. None of them takes part.
class BesideCapture {
 public:
  BesideCapture() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "changing the stream capture mode"); }
  ~BesideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideCapture(const BesideCapture&) = delete;
  BesideCapture& operator=(const BesideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// The graph that a stream is being captured into, or null.
cudaGraph_t graph_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaGraph_t graph = nullptr;
#if CUDART_VERSION >= 13000
  const cudaError_t error =
      cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph, nullptr, nullptr, nullptr);
#else
  const cudaError_t error = cudaStreamGetCaptureInfo_v2(stream, &status, nullptr, &graph, nullptr, nullptr);
#endif
  check(error, "asking whether the stream is being captured");
  if (status == cudaStreamCaptureStatusInvalidated) {
    throw Error(
        "gradkern: the capture of this stream has already failed: nothing was added to it. The error "
        "that an operation before this one raised says why.");
  }
  return status == cudaStreamCaptureStatusActive ? graph : nullptr;
}

/// Pinned memory on its way to a device. It may be written again once `sent` has passed and nobody owns it.
struct Slot {
  char* data = nullptr;
  size_t bytes = 0;
  cudaEvent_t sent = nullptr;
  std::atomic<bool> owned{false};  // by the call that fills it, or by a graph that copies from it
};

/// Grows to what is under way at a time, and is never freed: freeing pinned memory waits for the device.
class PinnedRing {
 public:
  /// A slot that nobody reads or will read, owned from now on. After an error it stays so: its copy may
  /// have been enqueued.
  Slot& take(size_t bytes) {
    const BesideCapture beside;
    for (const std::unique_ptr<Slot>& slot : slots_) {
      if (slot->bytes < bytes || slot->owned.load(std::memory_order_acquire)) continue;
      const cudaError_t passed = cudaEventQuery(slot->sent);
      if (passed == cudaErrorNotReady) continue;
      check(passed, "asking whether a copy is complete");
      slot->owned.store(true, std::memory_order_relaxed);
      return *slot;
    }
    auto slot = std::make_unique<Slot>();
    slot->bytes = kSmallestBytes;
    while (slot->bytes < bytes) slot->bytes *= 2;
    void* data = nullptr;
    const std::string what =
        std::to_string(slot->bytes) + " bytes of pinned memory for the tables of a launch";
    check(cudaEventCreateWithFlags(&slot->sent, cudaEventDisableTiming), "creating an event");
    const cudaError_t error = cudaHostAlloc(&data, slot->bytes, cudaHostAllocDefault);
    if (error != cudaSuccess) cudaEventDestroy(slot->sent);
    check(error, "allocating " + what);
    slot->data = static_cast<char*>(data);
    slot->owned.store(true, std::memory_order_relaxed);
    slots_.push_back(std::move(slot));
    return *slots_.back();
  }

 private:
  static constexpr size_t kSmallestBytes = size_t{1} << 16;
  std::vector<std::unique_ptr<Slot>> slots_;
};

/// Gives a slot to a graph. CUDA calls `destroy` from any thread, where neither CUDA may be called nor a
/// lock be taken that somebody holds while calling CUDA: hence the atomic flag.
void give_to_graph(cudaGraph_t graph, Slot& slot) {
  const cudaHostFn_t destroy = [](void* slot) {
    static_cast<Slot*>(slot)->owned.store(false, std::memory_order_release);
  };
  cudaUserObject_t object = nullptr;
  check(cudaUserObjectCreate(&object, &slot, destroy, 1, cudaUserObjectNoDestructorSync),
        "making pinned memory an object of the graph");
  check(cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove),
        "giving pinned memory to the graph");
}

/// A stream and a list of shapes: everything that a plan block depends on. The stream by its id, which
/// unlike its handle is never used again for another.
using Key = std::vector<int64_t>;

struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t hash = key.size();
    for (const int64_t word : key) {
      hash = (hash ^ static_cast<uint64_t>(word)) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

constexpr size_t aligned(size_t bytes) { return (bytes + 15) / 16 * 16; }

/// What a list of shapes is cut into, and where things lie in its plan block: first what is filled once
/// from the host, then addresses, then what kernels write.
struct Layout {
  Layout(const Tensors& tensors, size_t address_count)
      : spans(tensors.spans), units(tensors.units.has_value() ? tensors.units->data() : nullptr) {
    int64_t total = 0;
    for (const Span& span : spans) total += span.numel;
    chunk_numel = chunk_numel_for(total);
    for (size_t i = 0; i < spans.size(); ++i) {
      chunk_total += units ? unit_chunk_count(units[i]) : chunk_count(spans[i].numel, chunk_numel);
    }
    if (chunk_total > INT32_MAX || spans.size() > INT32_MAX / 2) {
      throw Error("gradkern: " + std::to_string(spans.size()) + " tensors of " + std::to_string(total) +
                  " elements are more than one launch can take. Pass them in several lists.");
    }
    tensors_at = aligned(chunk_total * sizeof(Chunk));
    tickets_at = tensors_at + aligned(spans.size() * sizeof(TensorPlan));
    addresses_at = tickets_at + tickets_bytes(static_cast<int64_t>(spans.size()));
    partials_at = addresses_at + aligned(address_count * sizeof(void*));
    bytes = partials_at + aligned(chunk_total * sizeof(Stats));
  }

  /// Writes what lies before `addresses_at`, and counts the tensors that have chunks.
  int32_t write_tables(char* to) const {
    Chunk* const first = reinterpret_cast<Chunk*>(to);
    TensorPlan* const plans = reinterpret_cast<TensorPlan*>(to + tensors_at);
    Chunk* next = first;
    int32_t filled = 0;
    for (size_t i = 0; i < spans.size(); ++i) {
      const int32_t index = static_cast<int32_t>(i);
      TensorPlan tensor;
      tensor.dtype = spans[i].dtype;
      tensor.first_chunk = static_cast<int32_t>(next - first);
      if (units) {
        tensor.unit_numel = units[i].numel;
        tensor.first_unit = units[i].first;
        next = plan_units(index, units[i], next);
      } else {
        next = plan(index, spans[i].numel, next, chunk_numel);
      }
      tensor.chunk_count = static_cast<int32_t>(next - first) - tensor.first_chunk;
      filled += tensor.chunk_count > 0;
      plans[i] = tensor;
    }
    memset(to + tickets_at, 0, addresses_at - tickets_at);
    return filled;
  }

  const std::vector<Span>& spans;
  const Units* units;  // null: not cut by units
  int64_t chunk_numel = 0;
  int64_t chunk_total = 0;
  size_t tensors_at, tickets_at, addresses_at, partials_at, bytes;
};

/// A plan block, and the pointers into it that launches need.
struct PlanBlock {
  PlanBlock(Block memory_given, size_t bytes, const Layout& layout)
      : memory(std::move(memory_given)), bytes(bytes), addresses_at(layout.addresses_at) {
    char* const base = static_cast<char*>(memory.get());
    plan.chunks = reinterpret_cast<const Chunk*>(base);
    plan.tensors = reinterpret_cast<const TensorPlan*>(base + layout.tensors_at);
    plan.chunk_count = static_cast<int32_t>(layout.chunk_total);
    plan.tensor_count = static_cast<int32_t>(layout.spans.size());
    workspace.tickets = reinterpret_cast<uint32_t*>(base + layout.tickets_at);
    workspace.partials = reinterpret_cast<Stats*>(base + layout.partials_at);
  }
  char* base() const { return static_cast<char*>(memory.get()); }
  /// The partials, for kernels whose partials are single numbers.
  double* partial_sums() const { return reinterpret_cast<double*>(workspace.partials); }

  Block memory;
  size_t bytes;
  size_t addresses_at;
  Plan plan;
  Workspace workspace;
  uint64_t last_use = 0;
};

struct Device {
  /// Memory for a plan block of a stream that is to be kept: new, or else that of the stream's block not used
  /// for longest, whose last use the stream has behind it before the next. Null where there is none.
  ///
  /// Never freed, because that waits for the device. Not from torch either: in the warm-up of
  /// `torch.compile(mode="reduce-overhead")` it would come from the pool of a graph, which must not keep any.
  Block memory_to_keep(size_t bytes, int64_t stream_id) {
    if (kept_bytes + bytes <= kKeptBytes) {
      const BesideCapture beside;
      void* memory = nullptr;
      const cudaError_t error = cudaMalloc(&memory, bytes);
      if (error == cudaSuccess) {
        kept_bytes += bytes;
        return Block(memory, [](void*) {});
      }
      if (error != cudaErrorMemoryAllocation) check(error, "allocating memory for launch tables");
    }
    auto oldest = blocks.end();
    for (auto block = blocks.begin(); block != blocks.end(); ++block) {
      if (block->first.front() != stream_id || block->second.bytes != bytes) continue;
      if (oldest == blocks.end() || block->second.last_use < oldest->second.last_use) oldest = block;
    }
    if (oldest == blocks.end()) return nullptr;
    Block memory = std::move(oldest->second.memory);
    blocks.erase(oldest);
    return memory;
  }

  bool ready = false;  // the kernels have been seen to load, and the next two are known
  int sm_count = 0;
  bool large_arguments = false;
  PinnedRing ring;
  std::unordered_map<Key, PlanBlock, KeyHash> blocks;
  size_t kept_bytes = 0;
  uint64_t uses = 0;
};

struct State {
  std::mutex mutex;
  std::map<int, Device> devices;
};

/// Never destroyed: at exit CUDA and torch may be gone already.
State& state() {
  static State* const all = new State;
  return *all;
}

std::string driver_problem(cudaError_t error) {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  const std::string built = "gradkern's kernels were built with CUDA " + version(CUDART_VERSION);
  if (error == cudaErrorInsufficientDriver) {
    if (driver == 0) return built + ", but no NVIDIA driver is installed: install one to use a GPU.";
    return built + ", but the NVIDIA driver is too old: it serves CUDA " + version(driver) +
           ". Update the driver, or build gradkern with a CUDA toolkit that it serves.";
  }
  if (error == cudaErrorNoDevice) {
    return built + ", but no CUDA device is visible. See `nvidia-smi`, and CUDA_VISIBLE_DEVICES.";
  }
  return built + ", but CUDA cannot be used: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) +
         ").";
}

/// Loads all kernels now: left to the first launch it could happen, and wait, while training.
cudaError_t load_kernels(bool large_arguments) {
  for (const Kernel kernel : {Kernel::kStats, Kernel::kValue, Kernel::kApply, Kernel::kUnitSums,
                              Kernel::kExponents, Kernel::kPenalty}) {
    for (const int capacity : {0, kFewAddresses, kManyAddresses}) {
      if (capacity == kManyAddresses && !large_arguments) continue;
      cudaFuncAttributes attributes;
      const cudaError_t loaded = cudaFuncGetAttributes(&attributes, kernel_handle(kernel, capacity));
      if (loaded != cudaSuccess) return loaded;
    }
  }
  return cudaSuccess;
}

/// Finds out about `device`, or returns why it cannot be used. With the state locked.
std::string prepare(int index, Device& device) {
  if (device.ready) return "";
  int count = 0;
  const cudaError_t counted = cudaGetDeviceCount(&count);
  if (counted != cudaSuccess) return driver_problem(counted);
  const std::string name = "cuda:" + std::to_string(index);
  if (index < 0 || index >= count)
    return "there is no " + name + ": CUDA sees " + std::to_string(count) + " devices.";

  const BesideCapture beside;
  const DeviceGuard guard(index);
  int major = 0, minor = 0, driver = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index),
        "asking for the architecture");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index),
        "asking for the architecture");
  check(cudaDeviceGetAttribute(&device.sm_count, cudaDevAttrMultiProcessorCount, index),
        "asking for the SM count");
  check(cudaDriverGetVersion(&driver), "asking for the driver's version");
  const std::string arch = "sm_" + std::to_string(10 * major + minor);
  device.large_arguments = driver >= 12010;  // the architectures that we build for all take them
  const cudaError_t loaded = load_kernels(device.large_arguments);
  if (loaded == cudaErrorNoKernelImageForDevice || loaded == cudaErrorInvalidDeviceFunction) {
    return name + " is of architecture " + arch + ", but gradkern's kernels were built for " +
           compiled_for() +
           ". Build gradkern again with GRADKERN_CUDA_ARCHS=" + std::to_string(10 * major + minor) + ".";
  }
  if (loaded != cudaSuccess) return driver_problem(loaded);
  device.ready = true;
  return "";
}

}  // namespace

std::string compiled_for() {
  std::string archs;
  for (const char* at = GRADKERN_CUDA_ARCHS; *at != '\0'; ++at)
    archs += *at == ',' ? std::string(", sm_") : std::string(1, *at);
  return "sm_" + archs + " and newer (by PTX), by CUDA " + version(CUDART_VERSION);
}

std::string problem(int device) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  return prepare(device, state().devices[device]);
}

struct Launch::Impl {
  Impl(const Target& target, const Tensors& tensors)
      : lock(state().mutex),
        device(state().devices[target.device]),
        stream(static_cast<cudaStream_t>(target.stream)) {
    const std::string reason = prepare(target.device, device);
    if (!reason.empty()) throw Error("gradkern: " + reason);
    guard.emplace(target.device);

    const size_t count = tensors.spans.size() + tensors.weights.size();
    if (count <= kFewAddresses) {
      capacity = kFewAddresses;
    } else if (count <= kManyAddresses && device.large_arguments) {
      capacity = kManyAddresses;
    }
    addresses.reserve(std::max<size_t>(count, capacity));
    for (const Span& span : tensors.spans) addresses.push_back(span.data);
    addresses.insert(addresses.end(), tensors.weights.begin(), tensors.weights.end());

    if (const cudaGraph_t graph = graph_of(stream)) {
      capture(graph, target, tensors);
    } else {
      find(target, tensors);
    }
    if (capacity == 0) {
      addresses = {block->base() + block->addresses_at};  // what `Addresses<0>` holds
    } else {
      addresses.resize(capacity);
    }
  }

  /// Gets a plan block that is this call's alone, and is filled by every replay.
  void capture(cudaGraph_t graph, const Target& target, const Tensors& tensors) {
    const Layout layout(tensors, copied_addresses());
    borrow(target, layout);
    Slot& slot = device.ring.take(layout.partials_at);
    write(layout, slot);
    give_to_graph(graph, slot);
    copy(slot, 0, layout.partials_at);
  }

  /// Gets the plan block of these shapes on this stream. Tables are copied to it only if it is new.
  void find(const Target& target, const Tensors& tensors) {
    Key key = key_of(tensors);
    const auto found = device.blocks.find(key);
    if (found != device.blocks.end()) {
      block = &found->second;
      block->last_use = ++device.uses;
      if (const size_t bytes = copied_addresses() * sizeof(void*)) {
        Slot& slot = device.ring.take(bytes);
        memcpy(slot.data, addresses.data(), bytes);
        copy(slot, block->addresses_at, bytes);
        sent(slot);
      }
      return;
    }
    const Layout layout(tensors, copied_addresses());
    size_t bytes = kSmallestKept;
    while (bytes < layout.bytes) bytes *= 2;
    Block memory = device.memory_to_keep(bytes, key.front());
    const bool keep = memory != nullptr;
    if (keep) {
      own.emplace(std::move(memory), bytes, layout);
      block = &*own;
    } else {
      borrow(target, layout);
    }
    Slot& slot = device.ring.take(layout.partials_at);
    write(layout, slot);
    copy(slot, 0, layout.partials_at);
    sent(slot);
    if (keep) {
      block = &device.blocks.emplace(std::move(key), std::move(*own)).first->second;
      block->last_use = ++device.uses;
    }
  }

  /// Addresses that are copied to the plan block, because they do not fit into an argument.
  size_t copied_addresses() const { return capacity == 0 ? addresses.size() : 0; }

  Key key_of(const Tensors& tensors) const {
    unsigned long long id = 0;
    check(cudaStreamGetId(stream, &id), "asking for the stream's id");
    Key key;
    key.reserve(3 + tensors.spans.size() * (tensors.units ? 2 : 1));
    key.push_back(static_cast<int64_t>(id));
    key.push_back(tensors.units.has_value());
    key.push_back(static_cast<int64_t>(addresses.size()));
    for (const Span& span : tensors.spans) key.push_back(span.numel << 2 | static_cast<int64_t>(span.dtype));
    if (tensors.units) {
      for (const Units& units : *tensors.units) key.push_back(units.count);
    }
    return key;
  }

  /// Takes a plan block that goes back when this call is over.
  void borrow(const Target& target, const Layout& layout) {
    const std::string what = "the launch tables and partial sums of " + std::to_string(layout.spans.size()) +
                             " tensors in " + std::to_string(layout.chunk_total) + " chunks";
    Block memory = target.allocate(layout.bytes, what);
    if (memory == nullptr) {
      throw Error("gradkern: out of memory on cuda:" + std::to_string(target.device) + ": " +
                  std::to_string(layout.bytes) + " bytes for " + what + ".");
    }
    own.emplace(std::move(memory), layout.bytes, layout);
    block = &*own;
  }

  /// Writes all that a new plan block is filled with.
  void write(const Layout& layout, const Slot& slot) {
    block->plan.filled_count = layout.write_tables(slot.data);
    memcpy(slot.data + layout.addresses_at, addresses.data(), copied_addresses() * sizeof(void*));
  }

  void copy(const Slot& slot, size_t at, size_t bytes) {
    check(cudaMemcpyAsync(block->base() + at, slot.data, bytes, cudaMemcpyHostToDevice, stream),
          "copying launch tables to the device");
  }

  /// The slot may be written again once the stream has come this far.
  void sent(Slot& slot) {
    check(cudaEventRecord(slot.sent, stream), "recording an event");
    slot.owned.store(false, std::memory_order_relaxed);
  }

  template <class Args>
  void launch(Kernel kernel, Args& args) {
    args.plan = block->plan;
    void* arguments[] = {&args, addresses.data()};
    const int32_t grid = grid_for(kernel, block->plan.chunk_count, device.sm_count);
    check(cudaLaunchKernel(kernel_handle(kernel, capacity), dim3(grid), dim3(kBlock), arguments, 0, stream),
          std::string("launching ") + kernel_name(kernel));
  }

  std::unique_lock<std::mutex> lock;
  Device& device;
  cudaStream_t stream;
  std::optional<DeviceGuard> guard;
  int capacity = 0;              // of the kernels' second argument
  std::vector<void*> addresses;  // at least `capacity` of them: CUDA copies that many
  PlanBlock* block = nullptr;
  std::optional<PlanBlock> own;  // unless it is one that is kept
};

namespace {

void set_bounds(double (&bounds)[4], double clip_value) {
  for (int i = 0; i < 4; ++i) bounds[i] = round_to(static_cast<DType>(i), clip_value);
}

}  // namespace

Launch::Launch(const Target& target, const Tensors& tensors)
    : impl_(std::make_unique<Impl>(target, tensors)) {}

Launch::~Launch() = default;

void Launch::stats(const Finish& finish) {
  StatsArgs args;
  args.workspace = impl_->block->workspace;
  args.finish = finish;
  impl_->launch(Kernel::kStats, args);
}

void Launch::value(const Finish& finish, double clip_value) {
  ValueArgs args;
  args.workspace = impl_->block->workspace;
  args.finish = finish;
  set_bounds(args.bounds, clip_value);
  impl_->launch(Kernel::kValue, args);
}

void Launch::apply(const double* coef, CoefScope scope, const Stats* rows, double clip_value,
                   NonFinite nonfinite) {
  ApplyArgs args;
  args.coef = coef;
  args.rows = rows;
  args.scope = scope;
  args.nonfinite = nonfinite;
  set_bounds(args.bounds, clip_value);
  impl_->launch(Kernel::kApply, args);
}

void Launch::unit_sums(double* sum_sq) {
  UnitSumsArgs args;
  args.partials = impl_->block->partial_sums();
  args.tickets = impl_->block->workspace.tickets;
  args.sum_sq = sum_sq;
  impl_->launch(Kernel::kUnitSums, args);
}

void Launch::exponents(int64_t* counts) {
  ExponentsArgs args;
  args.counts = counts;
  impl_->launch(Kernel::kExponents, args);
}

void Launch::penalty(double l1, double l2, double* values) {
  PenaltyArgs args;
  args.partials = impl_->block->partial_sums();
  args.tickets = impl_->block->workspace.tickets;
  args.l1 = l1;
  args.l2 = l2;
  args.values = values;
  impl_->launch(Kernel::kPenalty, args);
}

}  // namespace gradkern::cuda
