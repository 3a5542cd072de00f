#include "cuda_ops.h"

/// The answers of a build without CUDA kernels.

namespace gradkern::bindings {

std::optional<std::string> cuda_compiled_for() { return std::nullopt; }
std::string cuda_problem(int) { return "this build of gradkern has no CUDA kernels"; }
bool cuda_usable(int) { return false; }
std::string stream_route() { return ""; }

}  // namespace gradkern::bindings
