// Lays out device memory for a case, launches a kernel under the executor and brings the results back. Called
// by kernels.py through ctypes, which declares the same two structures.

#include <cstring>
#include <string>
#include <vector>

#include "csrc/cuda/kernels.h"
#include "executor.h"

using namespace gradkern;
using namespace gradkern::cuda;

namespace {

struct Tensor {
  void* data;     // host memory; what the kernel leaves is written back
  void* weights;  // for penalties
  int64_t numel;
  int64_t units;
  int64_t misalignment;  // of the data, in bytes behind a multiple of 16
  int64_t weights_misalignment;
  int64_t dtype;
};

struct Case {
  int64_t kernel, capacity, launches, seed;
  const Tensor* tensors;
  int64_t tensor_count, chunk_numel;
  int64_t first_offset;  // what chunks pretend to lie behind, to see offsets beyond 32 bits
  // Inputs.
  double max_norm, eps, l1, l2;
  const double* limit;
  const double* bounds;  // [4]
  int64_t nonfinite, scope;
  const double* coefs;
  int64_t coef_count;
  const Stats* known_rows;
  // Outputs. Null where they are not wanted.
  Stats *rows, *total;
  double *norm, *coef;
  float *found_inf, *grad_scale;
  double* sums;  // [units of all tensors]
  int64_t* counts;
  double* values;
  int64_t bytes_read, bytes_written, first;  // of gradients and weights, as in executor::Traffic
};

template <class T>
T* upload(const char* name, const T* host, size_t count) {
  return host ? static_cast<T*>(executor::allocate(name, count * sizeof(T), 0, host)) : nullptr;
}
template <class T>
T* unwritten(const char* name, size_t count) {
  return static_cast<T*>(executor::allocate(name, count * sizeof(T), 0, nullptr));
}

template <int kCapacity, class Args>
std::string launch_with(const Case& c, const Args& args, const Addresses<kCapacity>& addresses, int64_t seed,
                        executor::Traffic* traffic) {
  const int sms = 1;
  const int grid = static_cast<int>(grid_for(static_cast<Kernel>(c.kernel), args.plan.chunk_count, sms));
  using Function = void (*)(Args, Addresses<kCapacity>);
  const void* const handle = kernel_handle(static_cast<Kernel>(c.kernel), kCapacity);
  if (handle == nullptr) return "harness: this kernel was not compiled";
  const Function kernel = reinterpret_cast<Function>(const_cast<void*>(handle));
  return executor::launch([&] { kernel(args, addresses); }, grid, kBlock, seed, traffic);
}

template <class Args>
std::string launch(const Case& c, const Args& args, const std::vector<void*>& where, int64_t seed,
                   executor::Traffic* traffic) {
  if (c.capacity == kFewAddresses) {
    Addresses<kFewAddresses> addresses{};
    std::copy(where.begin(), where.end(), addresses.data);
    return launch_with(c, args, addresses, seed, traffic);
  }
  if (c.capacity == kManyAddresses) {
    Addresses<kManyAddresses> addresses{};
    std::copy(where.begin(), where.end(), addresses.data);
    return launch_with(c, args, addresses, seed, traffic);
  }
  void* const* const table = upload("addresses", where.data(), where.size());
  return launch_with(c, args, Addresses<0>{table}, seed, traffic);
}

/// A case laid out in device memory.
struct Run {
  Case& c;
  std::vector<TensorPlan> shapes;
  std::vector<Chunk> chunks;
  std::vector<void*> data, addresses;  // where tensors lie, and what the kernel is told
  size_t units = 0;
  executor::Traffic traffic;
  Plan plan;
  Workspace workspace;
  std::string problem;

  explicit Run(Case& of) : c(of) {
    executor::reset();
    for (int64_t t = 0; t < c.tensor_count; ++t) make_plan(t);
    for (int64_t t = 0; t < c.tensor_count; ++t) place(c.tensors[t].data, t, c.tensors[t].misalignment);
    if (kernel() == Kernel::kPenalty) {
      for (int64_t t = 0; t < c.tensor_count; ++t)
        place(c.tensors[t].weights, t, c.tensors[t].weights_misalignment);
    }
    traffic.begin = data.empty() ? nullptr : static_cast<char*>(data.front());
    traffic.end = unwritten<char>("behind the tensors", 1);

    plan.chunks = upload("chunks", chunks.data(), chunks.size());
    plan.tensors = upload("shapes", shapes.data(), shapes.size());
    plan.chunk_count = static_cast<uint32_t>(chunks.size());
    plan.tensor_count = static_cast<int32_t>(shapes.size());
    for (const TensorPlan& shape : shapes) plan.filled_count += shape.chunk_count > 0;
    const std::vector<uint32_t> zeros(shapes.size() + 1, 0);
    workspace.tickets = upload("tickets", zeros.data(), zeros.size());
    workspace.partials = unwritten<Stats>("partials", chunks.size());
  }

  Kernel kernel() const { return static_cast<Kernel>(c.kernel); }

  void make_plan(int64_t t) {
    const Tensor& tensor = c.tensors[t];
    const bool by_unit = kernel() == Kernel::kUnitSums ||
                         (kernel() == Kernel::kApply && static_cast<CoefScope>(c.scope) == CoefScope::kUnit);
    const Units of{tensor.units, tensor.units ? tensor.numel / tensor.units : 0, static_cast<int64_t>(units)};
    const int64_t count = by_unit ? unit_chunk_count(of) : chunk_count(tensor.numel, c.chunk_numel);
    shapes.push_back({of.numel, of.first, static_cast<int32_t>(chunks.size()), static_cast<int32_t>(count),
                      static_cast<DType>(tensor.dtype), 0});
    chunks.resize(chunks.size() + count);
    Chunk* const first = chunks.data() + chunks.size() - count;
    const int32_t index = static_cast<int32_t>(t);
    if (by_unit) {
      plan_units(index, of, first);
    } else {
      gradkern::plan(index, tensor.numel, first, c.chunk_numel);
    }
    for (int64_t i = 0; i < count; ++i) first[i].offset += c.first_offset;
    units += tensor.units;
  }

  int64_t width(int64_t t) const { return element_bytes(static_cast<DType>(c.tensors[t].dtype)); }

  void place(const void* host, int64_t t, int64_t misalignment) {
    const std::string name = "tensor " + std::to_string(data.size());
    data.push_back(executor::allocate(name.c_str(), c.tensors[t].numel * width(t), misalignment, host));
    const uintptr_t told = reinterpret_cast<uintptr_t>(data.back()) - c.first_offset * width(t);
    addresses.push_back(reinterpret_cast<void*>(told));
  }

  template <class Args>
  void launch_repeatedly(const Args& args) {
    for (int64_t i = 0; i < c.launches && problem.empty(); ++i) {
      problem = launch(c, args, addresses, c.seed + i, &traffic);
    }
    c.bytes_read = traffic.read_bytes;
    c.bytes_written = traffic.written_bytes;
    c.first = traffic.first;
    for (int64_t t = 0; t < c.tensor_count; ++t) {
      fetch("a gradient", data[t], static_cast<char*>(c.tensors[t].data), c.tensors[t].numel * width(t));
    }
    std::vector<uint32_t> tickets(shapes.size() + 1);
    fetch("the tickets", workspace.tickets, tickets.data(), tickets.size());
    for (const uint32_t ticket : tickets) {
      if (ticket != 0 && problem.empty()) problem = "tickets: not zero after the launch";
    }
  }

  template <class T>
  void fetch(const char* name, const T* device, T* host, size_t count) {
    if (!problem.empty()) return;
    if (!executor::read(device, host, count * sizeof(T))) problem = std::string("not written: ") + name;
  }
  void fetch(const char* name, const void* device, char* host, size_t bytes) {
    fetch(name, static_cast<const char*>(device), host, bytes);
  }

  Finish finish() const {
    Finish to;
    to.rows = unwritten<Stats>("rows", shapes.size());
    if (c.total) to.total = unwritten<Stats>("total", 1);
    if (c.norm) to.norm = unwritten<double>("norm", 1);
    if (c.coef) to.coef = unwritten<double>("coef", 1);
    if (c.found_inf) to.found_inf = unwritten<float>("found_inf", 1);
    if (c.grad_scale) to.grad_scale = unwritten<float>("grad_scale", 1);
    to.limit = upload("limit", c.limit, 1);
    to.max_norm = c.max_norm;
    to.eps = c.eps;
    to.nonfinite = static_cast<NonFinite>(c.nonfinite);
    return to;
  }

  void fetch_finished(const Finish& from) {
    fetch("rows", from.rows, c.rows, shapes.size());
    if (c.total) fetch("total", from.total, c.total, 1);
    if (c.norm) fetch("norm", from.norm, c.norm, 1);
    if (c.coef) fetch("coef", from.coef, c.coef, 1);
    if (c.found_inf) fetch("found_inf", from.found_inf, c.found_inf, 1);
    if (c.grad_scale) fetch("grad_scale", from.grad_scale, c.grad_scale, 1);
  }

  void run() {
    switch (kernel()) {
      case Kernel::kStats: {
        const StatsArgs args{plan, workspace, finish()};
        launch_repeatedly(args);
        return fetch_finished(args.finish);
      }
      case Kernel::kValue: {
        ValueArgs args{plan, workspace, finish()};
        std::copy_n(c.bounds, 4, args.bounds);
        launch_repeatedly(args);
        return fetch_finished(args.finish);
      }
      case Kernel::kApply: {
        ApplyArgs args;
        args.plan = plan;
        args.coef = upload("coefs", c.coefs, c.coef_count);
        args.rows = upload("known rows", c.known_rows, shapes.size());
        std::copy_n(c.bounds, 4, args.bounds);
        args.scope = static_cast<CoefScope>(c.scope);
        args.nonfinite = static_cast<NonFinite>(c.nonfinite);
        return launch_repeatedly(args);
      }
      case Kernel::kUnitSums: {
        UnitSumsArgs args{plan, unwritten<double>("unit partials", chunks.size()), workspace.tickets,
                          unwritten<double>("unit sums", units)};
        launch_repeatedly(args);
        return fetch("unit sums", args.sum_sq, c.sums, units);
      }
      case Kernel::kExponents: {
        const size_t count = shapes.size() * kExponentColumns;
        const std::vector<int64_t> zeros(count, 0);
        const ExponentsArgs args{plan, upload("counts", zeros.data(), count)};
        launch_repeatedly(args);
        return fetch("counts", args.counts, c.counts, count);
      }
      case Kernel::kPenalty: {
        PenaltyArgs args{plan,
                         unwritten<double>("penalty partials", chunks.size()),
                         workspace.tickets,
                         c.l1,
                         c.l2,
                         unwritten<double>("values", shapes.size())};
        launch_repeatedly(args);
        return fetch("values", args.values, c.values, shapes.size());
      }
    }
  }
};

}  // namespace

/// Runs a case. Returns null, or what is wrong with the kernel; the text lives until the next call.
extern "C" const char* run_case(Case* c) {
  static std::string problem;
  Run run(*c);
  run.run();
  problem = run.problem;
  return problem.empty() ? nullptr : problem.c_str();
}

extern "C" int64_t case_bytes() { return sizeof(Case); }
