#include "apply.cuh"
#include "exponents.cuh"
#include "rows.cuh"
#include "stats.cuh"

namespace gradkern::cuda {
namespace {

template <int kCapacity>
const void* handle(Kernel kernel) {
  switch (kernel) {
    case Kernel::kStats: return reinterpret_cast<const void*>(stats_kernel<kCapacity>);
    case Kernel::kValue: return reinterpret_cast<const void*>(value_kernel<kCapacity>);
    case Kernel::kApply: return reinterpret_cast<const void*>(apply_kernel<kCapacity>);
    case Kernel::kRowSums: return reinterpret_cast<const void*>(row_sums_kernel<kCapacity>);
    case Kernel::kExponents: return reinterpret_cast<const void*>(exponents_kernel<kCapacity>);
    default: return nullptr;
  }
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
