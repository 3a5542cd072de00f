#include "runtime.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>

using namespace gradkern;
using namespace gradkern::cuda;

/// Something queued: its steps, and the name of the call that queued it.
struct Work {
  std::string name;
  std::vector<std::function<void()>> steps;
};
struct CUevent_st {
  bool recorded = false, passed = false, captured = false;
};
struct CUuserObject_st {
  void* owned;
  cudaHostFn_t destroy;
};
struct CUgraph_st {
  std::vector<Work> work;
  std::vector<cudaUserObject_t> objects;
  int under_way = 0;
};
struct CUstream_st {
  int device = 0;
  unsigned long long id = 0;
  std::deque<std::pair<std::string, std::function<void()>>> queue;
  cudaGraph_t graph = nullptr;
  bool invalidated = false;
};

namespace {

/// Device memory: lent by the allocator to a stream (and a graph's pool), or from cudaMalloc.
struct Memory {
  size_t bytes = 0;
  int device = 0;
  cudaStream_t stream = nullptr;
  cudaGraph_t pool = nullptr;
  bool live = true;
};

struct World {
  runtime::Setting setting;
  std::vector<std::string> calls;
  int call_count = 0;
  int current_device = 0;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::vector<cudaStream_t> streams;
  std::map<char*, Memory> device_memory;
  std::vector<char*> freed;  // to be lent again, the last first
  std::map<char*, size_t> pinned;
  int64_t lendable = INT64_MAX;
  Plan last_plan;
};
World& world() {
  static World all;
  return all;
}

using runtime::report;

/// Notes a call; true if it is the one that is to fail.
bool fails(const char* name) {
  world().calls.emplace_back(name);
  return world().call_count++ == world().setting.fail_call;
}
#define CALL() \
  if (fails(__func__)) return world().setting.fail_with

/// A call that a capture in global mode does not allow ends every capture under way.
cudaError_t unsafe(const char* name) {
  if (world().mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  for (cudaStream_t stream : world().streams) {
    if (stream->graph == nullptr) continue;
    report(std::string(name) + " while a stream is being captured");
    stream->invalidated = true;
    error = cudaErrorStreamCaptureUnsafe;
  }
  return error;
}

cudaError_t blocking(const char* name) {
  report(std::string(name) + " waits for the device");
  return cudaSuccess;
}

void enqueue(cudaStream_t stream, Work work) {
  if (world().current_device != stream->device) report(work.name + " on a stream of another device");
  if (stream->graph != nullptr) {
    stream->graph->work.push_back(std::move(work));
  } else {
    for (auto& step : work.steps) stream->queue.emplace_back(work.name, std::move(step));
  }
}

const std::pair<char* const, Memory>* memory_of(const void* address) {
  char* const at = static_cast<char*>(const_cast<void*>(address));
  auto after = world().device_memory.upper_bound(at);
  if (after == world().device_memory.begin()) return nullptr;
  --after;
  return at < after->first + after->second.bytes ? &*after : nullptr;
}

/// Memory that work on the stream may use: of its device, not freed, and either the graph's own or nobody's
/// but eager work's. Memory that the allocator lent must have been lent to this stream.
void require(cudaStream_t stream, const void* address, size_t bytes, const std::string& what) {
  const auto* found = memory_of(address);
  if (found == nullptr) return report(what + " is not in device memory");
  const auto& [base, memory] = *found;
  if (static_cast<const char*>(address) + bytes > base + memory.bytes)
    report(what + " reaches beyond its memory");
  if (!memory.live) report(what + " is in memory that was given back");
  if (memory.device != stream->device) report(what + " is on another device");
  if (memory.pool != stream->graph) {
    report(what + (stream->graph ? " of a captured call is shared with eager ones" : " belongs to a graph"));
  }
  if (memory.stream != nullptr && memory.stream != stream) report(what + " was lent to another stream");
}

Block lend(cudaStream_t stream, size_t bytes) {
  if (world().call_count++ == world().setting.fail_call || static_cast<int64_t>(bytes) > world().lendable) {
    world().calls.emplace_back("allocate");
    return nullptr;
  }
  world().calls.emplace_back("allocate");
  auto& freed = world().freed;
  char* base = nullptr;
  for (auto it = freed.rbegin(); it != freed.rend() && base == nullptr; ++it) {
    const Memory& memory = world().device_memory[*it];
    if (memory.stream != stream || memory.pool != stream->graph || memory.bytes < bytes) continue;
    base = *it;
    freed.erase(std::next(it).base());
  }
  if (base == nullptr) {
    const size_t rounded = (bytes + 511) / 512 * 512;
    base = static_cast<char*>(aligned_alloc(512, rounded));
    memset(base, 0xa5, rounded);
    world().device_memory[base] = {rounded, stream->device, stream, stream->graph, true};
  }
  world().device_memory[base].live = true;
  return Block(base, [](void* memory) {
    char* const base = static_cast<char*>(memory);
    world().device_memory[base].live = false;
    world().freed.push_back(base);
  });
}

// ---- the kernels, as kernels.h describes them

struct Handle {
  Kernel kernel;
  int capacity;
};
const Handle* handles() {
  static Handle all[6 * 3];
  for (int kernel = 0; kernel < 6; ++kernel) {
    for (int i = 0; i < 3; ++i) {
      all[3 * kernel + i] = {static_cast<Kernel>(kernel), i == 0   ? 0
                                                          : i == 1 ? kFewAddresses
                                                                   : kManyAddresses};
    }
  }
  return all;
}

double element(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat64) return static_cast<const double*>(data)[i];
  if (dtype != DType::kFloat32) report("a tensor of a dtype that the test did not use");
  return static_cast<const float*>(data)[i];
}
void set_element(void* data, DType dtype, int64_t i, double value) {
  if (dtype == DType::kFloat64) {
    static_cast<double*>(data)[i] = value;
  } else {
    static_cast<float*>(data)[i] = static_cast<float>(value);
  }
}

Stats stats_of(double x) {
  Stats stats;
  if (std::isnan(x))
    stats.nan_count = 1;
  else if (std::isinf(x))
    stats.inf_count = 1;
  else
    stats.sum_sq = x * x, stats.abs_max = std::fabs(x);
  stats.zero_count = x == 0;
  return stats;
}

/// A launch as the kernel sees it: copies of its arguments.
struct Launched {
  std::string name;
  Plan plan;
  std::vector<void*> addresses;  // empty: read from `address_table` when the kernel runs
  void* const* address_table = nullptr;

  void* data(const Chunk& chunk, int list = 0) const {
    const int64_t at = chunk.tensor + int64_t{list} * plan.tensor_count;
    return addresses.empty() ? address_table[at] : addresses[at];
  }
  DType dtype(const Chunk& chunk) const { return plan.tensors[chunk.tensor].dtype; }

  template <class Visit>
  void for_each(Visit visit) const {
    const int64_t chunks = plan.chunk_count;
    for (int64_t i = 0; i < chunks; ++i) {
      const Chunk& chunk = plan.chunks[i];
      if (chunk.tensor < 0 || chunk.tensor >= plan.tensor_count || chunk.length < 1 ||
          chunk.length > kChunkNumel) {
        return report(name + " read a chunk table that is none");
      }
      for (int64_t e = 0; e < chunk.length; ++e) visit(i, chunk, chunk.offset + e);
    }
  }
};

void take_tickets(const Launched& launched, uint32_t* tickets, int count) {
  for (int i = 0; i < count; ++i) {
    if (tickets[i] != 0) return report(launched.name + " found tickets that were not cleared, or are in use");
    tickets[i] = 1;
  }
}
void clear_tickets(uint32_t* tickets, int count) { std::fill(tickets, tickets + count, 0u); }

/// The steps of a kernel that measures and, if `bounds` are given, clips by value.
std::vector<std::function<void()>> measuring(const Launched& launched, const Workspace& workspace,
                                             const Finish& finish, std::vector<double> bounds) {
  const Plan& plan = launched.plan;
  return {[=] {
            take_tickets(launched, workspace.tickets, plan.tensor_count + 1);
            std::fill(workspace.partials, workspace.partials + plan.chunk_count, Stats{});
            launched.for_each([&](int64_t i, const Chunk& chunk, int64_t e) {
              void* const data = launched.data(chunk);
              const double x = element(data, launched.dtype(chunk), e);
              workspace.partials[i] = merge(workspace.partials[i], stats_of(x));
              if (bounds.empty()) return;
              const double bound = bounds[static_cast<int>(launched.dtype(chunk))];
              set_element(data, launched.dtype(chunk), e, std::max(-bound, std::min(bound, x)));
            });
          },
          [=] {
            Stats total;
            int filled = 0;
            for (int t = 0; t < plan.tensor_count; ++t) {
              const TensorPlan& tensor = plan.tensors[t];
              filled += tensor.chunk_count > 0;
              finish.rows[t] = {};
              for (int i = 0; i < tensor.chunk_count; ++i) {
                finish.rows[t] = merge(finish.rows[t], workspace.partials[tensor.first_chunk + i]);
              }
              total = merge(total, finish.rows[t]);
            }
            if (filled != plan.filled_count)
              report(launched.name + " was told a wrong number of filled tensors");
            *finish.total = total;
            const double max_norm = finish.limit ? *finish.limit : finish.max_norm;
            if (finish.coef) *finish.coef = clip_coef(total, max_norm, finish.eps, finish.nonfinite);
            clear_tickets(workspace.tickets, plan.tensor_count + 1);
          }};
}

std::vector<std::function<void()>> steps_of(const Launched& launched, Kernel kernel, const void* arguments) {
  const Plan& plan = launched.plan;
  switch (kernel) {
    case Kernel::kStats: {
      const StatsArgs args = *static_cast<const StatsArgs*>(arguments);
      return measuring(launched, args.workspace, args.finish, {});
    }
    case Kernel::kValue: {
      const ValueArgs args = *static_cast<const ValueArgs*>(arguments);
      return measuring(launched, args.workspace, args.finish, {args.bounds, args.bounds + 4});
    }
    case Kernel::kApply: {
      const ApplyArgs args = *static_cast<const ApplyArgs*>(arguments);
      return {[=] {
        launched.for_each([&](int64_t, const Chunk& chunk, int64_t e) {
          const TensorPlan& tensor = plan.tensors[chunk.tensor];
          const int64_t at = args.scope == CoefScope::kGlobal   ? 0
                             : args.scope == CoefScope::kTensor ? chunk.tensor
                                                                : tensor.first_unit + e / tensor.unit_numel;
          const double bound = args.bounds[static_cast<int>(tensor.dtype)];
          const double x = element(launched.data(chunk), tensor.dtype, e) * args.coef[at];
          set_element(launched.data(chunk), tensor.dtype, e, std::max(-bound, std::min(bound, x)));
        });
      }};
    }
    case Kernel::kUnitSums: {
      const UnitSumsArgs args = *static_cast<const UnitSumsArgs*>(arguments);
      return {[=] {
                take_tickets(launched, args.tickets, plan.tensor_count);
                launched.for_each([&](int64_t, const Chunk& chunk, int64_t e) {
                  const TensorPlan& tensor = plan.tensors[chunk.tensor];
                  double& sum = args.sum_sq[tensor.first_unit + e / tensor.unit_numel];
                  sum = e % tensor.unit_numel == 0 ? 0 : sum;
                  const double x = element(launched.data(chunk), tensor.dtype, e);
                  sum += x * x;
                });
              },
              [=] { clear_tickets(args.tickets, plan.tensor_count); }};
    }
    case Kernel::kExponents: {
      const ExponentsArgs args = *static_cast<const ExponentsArgs*>(arguments);
      return {[=] {
        launched.for_each([&](int64_t, const Chunk& chunk, int64_t e) {
          const double x = element(launched.data(chunk), launched.dtype(chunk), e);
          const int column = x == 0 ? kZeroColumn : kFirstExponentColumn + std::ilogb(x) - kFirstExponent;
          ++args.counts[kExponentColumns * chunk.tensor + column];
        });
      }};
    }
    default: {
      const PenaltyArgs args = *static_cast<const PenaltyArgs*>(arguments);
      return {[=] {
                take_tickets(launched, args.tickets, plan.tensor_count);
                std::fill(args.values, args.values + plan.tensor_count, 0.0);
                launched.for_each([&](int64_t, const Chunk& chunk, int64_t e) {
                  const DType dtype = launched.dtype(chunk);
                  const double w = element(launched.data(chunk, 1), dtype, e);
                  const double g = element(launched.data(chunk), dtype, e);
                  set_element(launched.data(chunk), dtype, e,
                              g + args.l1 * ((w > 0) - (w < 0)) + 2 * args.l2 * w);
                  args.values[chunk.tensor] += args.l1 * std::fabs(w) + args.l2 * w * w;
                });
              },
              [=] { clear_tickets(args.tickets, plan.tensor_count); }};
    }
  }
}

/// Checks that a kernel may use what it was given.
void require_arguments(cudaStream_t stream, const Launched& launched, Kernel kernel, const void* arguments) {
  const Plan& plan = launched.plan;
  const size_t tensors = plan.tensor_count, chunks = plan.chunk_count;
  require(stream, plan.chunks, chunks * sizeof(Chunk), launched.name + ": the chunk table");
  require(stream, plan.tensors, tensors * sizeof(TensorPlan), launched.name + ": the tensor table");
  if (launched.addresses.empty()) {
    const size_t lists = kernel == Kernel::kPenalty ? 2 : 1;
    require(stream, launched.address_table, lists * tensors * sizeof(void*),
            launched.name + ": the addresses");
  }
  if (kernel == Kernel::kStats || kernel == Kernel::kValue) {
    // Both begin alike.
    const Workspace& workspace = static_cast<const StatsArgs*>(arguments)->workspace;
    require(stream, workspace.tickets, (tensors + 1) * sizeof(uint32_t), launched.name + ": the tickets");
    require(stream, workspace.partials, chunks * sizeof(Stats), launched.name + ": the partials");
  }
  if (kernel == Kernel::kUnitSums || kernel == Kernel::kPenalty) {
    const UnitSumsArgs& args = *static_cast<const UnitSumsArgs*>(arguments);
    require(stream, args.tickets, tensors * sizeof(uint32_t), launched.name + ": the tickets");
    require(stream, args.partials, chunks * sizeof(double), launched.name + ": the partials");
  }
}

}  // namespace

namespace gradkern::cuda {

const void* kernel_handle(Kernel kernel, int capacity) {
  const int i = capacity == 0 ? 0 : capacity == kFewAddresses ? 1 : 2;
  return handles() + 3 * static_cast<int>(kernel) + i;
}

}  // namespace gradkern::cuda

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorLaunchFailure";
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "the error that the test asked for";
}
cudaError_t cudaDriverGetVersion(int* version) {
  CALL();
  *version = world().setting.driver;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  CALL();
  *count = world().setting.device_count;
  return world().setting.count;
}
cudaError_t cudaGetDevice(int* device) {
  CALL();
  *device = world().current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  CALL();
  world().current_device = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  CALL();
  *value = attribute == cudaDevAttrMultiProcessorCount      ? runtime::kSmCount
           : attribute == cudaDevAttrComputeCapabilityMajor ? 9
                                                            : 0;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* function) {
  CALL();
  if (const cudaError_t error = unsafe(__func__)) return error;
  const Handle& handle = *static_cast<const Handle*>(function);
  if (handle.capacity == kManyAddresses && world().setting.driver < 12010) return cudaErrorInvalidValue;
  return world().setting.load;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  CALL();
  if (world().setting.count != cudaSuccess) return world().setting.count;
  std::swap(*mode, world().mode);
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long*, cudaGraph_t* graph, const cudaGraphNode_t**,
                                     const cudaGraphEdgeData**, size_t*) {
  CALL();
  *status = stream->invalidated ? cudaStreamCaptureStatusInvalidated
            : stream->graph     ? cudaStreamCaptureStatusActive
                                : cudaStreamCaptureStatusNone;
  *graph = stream->graph;
  return cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  CALL();
  *id = stream->id;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  CALL();
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  CALL();
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  CALL();
  if (const cudaError_t error = unsafe(__func__)) return error;
  if (event->captured) {
    report("cudaEventQuery of an event that was recorded under capture");
    return cudaErrorCapturedEvent;
  }
  return event->recorded && !event->passed ? cudaErrorNotReady : cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  CALL();
  event->recorded = true;
  event->captured = stream->graph != nullptr;
  event->passed = false;
  enqueue(stream, {__func__, {[event] { event->passed = true; }}});
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  CALL();
  if (const cudaError_t error = unsafe(__func__)) return error;
  *memory = calloc(1, bytes);
  world().pinned[static_cast<char*>(*memory)] = bytes;
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** memory, size_t bytes) {
  CALL();
  if (const cudaError_t error = unsafe(__func__)) return error;
  if (static_cast<int64_t>(bytes) > world().setting.device_bytes) return cudaErrorMemoryAllocation;
  world().setting.device_bytes -= static_cast<int64_t>(bytes);
  *memory = malloc(bytes);
  memset(*memory, 0xa5, bytes);
  world().device_memory[static_cast<char*>(*memory)] = {bytes, world().current_device, nullptr, nullptr,
                                                        true};
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  CALL();
  const auto after = world().pinned.upper_bound(static_cast<char*>(const_cast<void*>(from)));
  const bool pinned =
      after != world().pinned.begin() &&
      static_cast<const char*>(from) + bytes <= std::prev(after)->first + std::prev(after)->second;
  if (kind != cudaMemcpyHostToDevice || !pinned)
    report("cudaMemcpyAsync from memory that is not pinned waits");
  require(stream, to, bytes, "the target of a copy");
  enqueue(stream, {__func__, {[=] { memcpy(to, from, bytes); }}});
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  CALL();
  const Handle handle = *static_cast<const Handle*>(function);
  Launched launched;
  launched.name = kernel_name(handle.kernel);
  launched.plan = *static_cast<const Plan*>(arguments[0]);  // which comes first in all of them
  world().last_plan = launched.plan;
  if (handle.capacity == 0) {
    launched.address_table = *static_cast<void* const* const*>(arguments[1]);
  } else {
    void* const* const addresses = static_cast<void* const*>(arguments[1]);
    launched.addresses.assign(addresses, addresses + handle.capacity);
  }
  const unsigned wanted = grid_for(handle.kernel, launched.plan.chunk_count, runtime::kSmCount);
  if (grid.x != wanted || grid.y != 1 || grid.z != 1 || block.x != kBlock || shared != 0) {
    report(launched.name + " was launched with a wrong grid");
  }
  if (launched.plan.chunk_count > 0) require_arguments(stream, launched, handle.kernel, arguments[0]);
  enqueue(stream, {launched.name, steps_of(launched, handle.kernel, arguments[0])});
  return cudaSuccess;
}
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* owned, cudaHostFn_t destroy, unsigned,
                                 unsigned) {
  CALL();
  *object = new CUuserObject_st{owned, destroy};
  return cudaSuccess;
}
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned, unsigned) {
  CALL();
  graph->objects.push_back(object);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return blocking(__func__); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return blocking(__func__); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return blocking(__func__); }
cudaError_t cudaMemcpy(void*, const void*, size_t, cudaMemcpyKind) { return blocking(__func__); }
cudaError_t cudaFree(void*) { return blocking(__func__); }
cudaError_t cudaFreeHost(void*) { return blocking(__func__); }

namespace runtime {

Setting& setting() { return world().setting; }
const std::vector<std::string>& calls() { return world().calls; }
void clear_calls() {
  world().calls.clear();
  world().call_count = 0;
}
int count_calls(const std::string& name) {
  return static_cast<int>(std::count(world().calls.begin(), world().calls.end(), name));
}
gradkern::cuda::Plan last_plan() { return world().last_plan; }
int64_t& lendable() { return world().lendable; }

cudaStream_t new_stream(int device) {
  cudaStream_t stream = new CUstream_st;
  stream->device = device;
  stream->id = world().streams.size() + 1;
  world().streams.push_back(stream);
  return stream;
}
Target target(cudaStream_t stream) {
  return {stream->device, stream, [stream](size_t bytes, const std::string&) { return lend(stream, bytes); }};
}

bool step(cudaStream_t stream) {
  if (stream->queue.empty()) return false;
  const std::function<void()> work = std::move(stream->queue.front().second);
  stream->queue.pop_front();
  work();
  return true;
}
void run(cudaStream_t stream) {
  while (step(stream)) continue;
}
void run_together(const std::vector<cudaStream_t>& streams) {
  for (bool more = true; more;) {
    more = false;
    for (cudaStream_t stream : streams) more = step(stream) || more;
  }
}

void begin_capture(cudaStream_t stream) {
  stream->graph = new CUgraph_st;
  stream->invalidated = false;
}
cudaGraph_t end_capture(cudaStream_t stream) {
  cudaGraph_t const graph = stream->graph;
  stream->graph = nullptr;
  return graph;
}
void invalidate(cudaStream_t stream) { stream->invalidated = true; }
bool capture_failed(cudaStream_t stream) { return stream->invalidated; }
void replay(cudaGraph_t graph, cudaStream_t stream) {
  ++graph->under_way;
  for (const Work& work : graph->work) {
    for (const auto& step : work.steps) stream->queue.emplace_back(work.name, step);
  }
  stream->queue.emplace_back("end of replay", [graph] { --graph->under_way; });
}
void destroy(cudaGraph_t graph) {
  if (graph->under_way > 0) report("the test destroyed a graph that is under way");
  for (cudaUserObject_t object : graph->objects) object->destroy(object->owned);
  delete graph;
}
std::vector<std::string> nodes(cudaGraph_t graph) {
  std::vector<std::string> names;
  for (const Work& work : graph->work) names.push_back(work.name);
  return names;
}

}  // namespace runtime
