#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "cuda/launch.h"

/// A stand-in for the CUDA runtime that records what it is asked for and acts it out late.
///
/// Work on a stream is only queued; it runs, in steps, when the test says so and in the order the test says.
/// A copy reads its source when it runs, not when it is asked for. A kernel takes two steps: it takes its
/// tickets and computes its partials in the first, and folds them in the second, so that two kernels on one
/// workspace spoil each other's results. So mistakes in the order of things end in wrong numbers, and what is
/// forbidden (waiting, capture-illegal calls, memory of someone else) is reported as it is asked for.
///
/// The kernels work on float32 and float64 and do what kernels.h says, without the non-finite words.

namespace runtime {

using gradkern::cuda::Block;
using gradkern::cuda::Target;

/// Devices with `kSmCount` SMs of architecture sm_90, unless the test says otherwise.
struct Setting {
  int device_count = 2;
  int driver = 13000;
  cudaError_t load = cudaSuccess;    ///< what loading a kernel returns
  cudaError_t count = cudaSuccess;   ///< what counting devices returns
  int64_t device_bytes = INT64_MAX;  ///< left to cudaMalloc
  int fail_call = -1;                ///< the call, counted from 0, that fails
  cudaError_t fail_with = cudaErrorLaunchFailure;
};
Setting& setting();
constexpr int kSmCount = 4;

/// Is told what was done that must not be done. The test defines it.
void report(const std::string& what);

/// Names of the functions called so far, in order; `clear_calls` forgets them.
const std::vector<std::string>& calls();
void clear_calls();
int count_calls(const std::string& name);

cudaStream_t new_stream(int device = 0);
/// A target on the stream, whose allocator lends memory as torch's does: most recently freed first, to the
/// same stream, and under capture from the pool of the graph.
Target target(cudaStream_t stream);
/// Bytes the allocator may still lend.
int64_t& lendable();

/// Runs one step of a stream; false if there is none.
bool step(cudaStream_t stream);
void run(cudaStream_t stream);
/// Runs the streams a step each, in turn.
void run_together(const std::vector<cudaStream_t>& streams);

void begin_capture(cudaStream_t stream);
cudaGraph_t end_capture(cudaStream_t stream);
/// What an illegal call would do to a capture, and whether that has happened.
void invalidate(cudaStream_t stream);
bool capture_failed(cudaStream_t stream);
void replay(cudaGraph_t graph, cudaStream_t stream);
/// When nothing of the graph is under way.
void destroy(cudaGraph_t graph);
/// What became part of the graph, by name.
std::vector<std::string> nodes(cudaGraph_t graph);

/// The plan of the last launch.
gradkern::cuda::Plan last_plan();

}  // namespace runtime
