#pragma once

#include <optional>
#include <string>

/// What is known of the CUDA kernels: in cuda_ops.cpp, or where the build has none, in no_cuda.cpp.

namespace gradkern::bindings {

/// Architectures and toolkit; nothing where the build has no CUDA kernels.
std::optional<std::string> cuda_compiled_for();
/// Why they cannot be used on a device, and what to do; empty if they can.
std::string cuda_problem(int device);
/// The same without the reason, at the price of a look.
bool cuda_usable(int device);
/// How torch's current stream is had.
std::string stream_route();

}  // namespace gradkern::bindings
