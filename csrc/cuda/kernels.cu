#include "apply.cuh"
#include "exponents.cuh"
#include "penalty.cuh"
#include "stats.cuh"
#include "units.cuh"

// Compile with -fmad=false: where products and sums are to be fused the kernels say `fma`, and elsewhere the
// results are those of the CPU kernels.

namespace gradkern::cuda {
namespace {

template <int kCapacity>
const void* handle(Kernel kernel) {
  switch (kernel) {
    case Kernel::kStats: return reinterpret_cast<const void*>(stats_kernel<kCapacity>);
    case Kernel::kValue: return reinterpret_cast<const void*>(value_kernel<kCapacity>);
    case Kernel::kApply: return reinterpret_cast<const void*>(apply_kernel<kCapacity>);
    case Kernel::kUnitSums: return reinterpret_cast<const void*>(unit_sums_kernel<kCapacity>);
    case Kernel::kExponents: return reinterpret_cast<const void*>(exponents_kernel<kCapacity>);
    case Kernel::kPenalty: return reinterpret_cast<const void*>(penalty_kernel<kCapacity>);
  }
  return nullptr;
}

}  // namespace

const void* kernel_handle(Kernel kernel, int capacity) {
  switch (capacity) {
    case kManyAddresses: return handle<kManyAddresses>(kernel);
    case kFewAddresses: return handle<kFewAddresses>(kernel);
    default: return handle<0>(kernel);
  }
}

}  // namespace gradkern::cuda
