#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

/// Launching the kernels, without torch: the caller says where (device, stream) and how device memory is
/// had, and gets everything else right here.
///
/// What belongs to shapes and what to addresses
///
///   A *plan block* is one piece of device memory that holds all a list of shapes needs: the tables of its
///   `Plan`, the tickets, the partials, and room for addresses. Gradients are new tensors on most steps, so
///   a plan block is found by shapes alone, and addresses travel with every launch: as a kernel argument
///   where they fit, else copied to the block from pinned memory.
///
///   A plan block serves one stream. Whatever uses it is therefore ordered by the stream, two streams never
///   share one, and no call needs to wait for another. Plan blocks are kept for the next call; where there
///   is no memory left for that, a call borrows one from the caller's allocator.
///
/// Under stream capture
///
///   A captured call uses nothing that was there before, and leaves nothing for later calls: it borrows a
///   plan block, from the graph's memory pool, and one copy node fills tables, cleared tickets and addresses
///   from pinned memory at the start of every replay. The pinned memory belongs to the graph (a CUDA user
///   object) until the last executable made of it is gone. The plan block goes back to the graph's pool when
///   the call returns: whoever gets it there runs later in the same graph, or in one that its owner lets
///   share the pool, and every replay fills it anew. Keeping it would be safe too, but `torch.compile` takes
///   memory that stays in use in the pools of its graphs for a leak.
///
/// Nothing here waits for a device. Where pinned memory is still being read, other pinned memory is taken.

namespace gradkern::cuda {

/// A call to CUDA failed, or was sure to fail. Says what, where, why, and what helps.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Device memory, freed with its last owner.
using Block = std::shared_ptr<void>;

/// Lends memory of the target's device, aligned to 16, for work on the target's stream: whoever gets the
/// memory next must come later on that stream, and while the stream is captured it must come from the
/// graph's pool. torch's caching allocator does all of that. `what` says what for. Throws, or returns null,
/// where there is none.
using Allocate = std::function<Block(size_t bytes, const std::string& what)>;

/// Where to launch.
struct Target {
  int device = 0;
  void* stream = nullptr;  ///< a `cudaStream_t` of the device
  Allocate allocate;
};

/// What to launch on: the list of one call.
struct Tensors {
  std::vector<Span> spans;
  std::optional<std::vector<Units>> units;  ///< one for each span: cut by them (a unit plan)
  std::vector<void*> weights;               ///< what the penalty is of, like the spans one by one; else empty
};

/// One operator on one list of tensors: plans, then launches any number of kernels on them.
///
/// Other threads wait in the constructor until this one is gone; it must be destroyed by the thread that
/// made it. Holders of Python's lock must give it up first, for `allocate` may take it.
class Launch {
 public:
  Launch(const Target& target, const Tensors& tensors);
  ~Launch();
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  void stats(const Finish& finish);
  void value(const Finish& finish, double clip_value);
  /// `rows` as in `ApplyArgs`. Unit scope needs a unit plan.
  void apply(const double* coef, CoefScope scope, const Stats* rows, double clip_value, NonFinite nonfinite);
  /// Needs a unit plan.
  void unit_sums(double* sum_sq);
  /// `counts` must have been cleared on the stream.
  void exponents(int64_t* counts);
  /// Needs weights.
  void penalty(double l1, double l2, double* values);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Why the kernels cannot run on this device, and what to do; empty if they can. Tries it out the first
/// time, which loads the kernels.
std::string problem(int device);

/// What the kernels were compiled for: "sm_75, ... and newer, by CUDA 13.0".
std::string compiled_for();

}  // namespace gradkern::cuda
