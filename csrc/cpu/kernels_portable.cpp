#include "kernels.h"

#include <cstring>

#include "denormals.h"
#include "lanes_portable.h"

namespace gradkern::cpu {
namespace portable {
#include "kernels.inl"
}  // namespace portable

extern const Kernels k_portable;
const Kernels k_portable = {
    "portable",          portable::measure,     portable::apply,       portable::clamp,
    portable::unit_sums, portable::apply_units, portable::add_penalty, portable::measure_sum_sq};

}  // namespace gradkern::cpu
