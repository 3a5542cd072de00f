#include "kernels.h"

#include <cstring>

#include "denormals.h"
#include "lanes_avx512.h"

namespace gradkern::cpu {
namespace avx512 {
#include "kernels.inl"
}  // namespace avx512

extern const Kernels k_avx512;
const Kernels k_avx512 = {
    "avx512",          avx512::measure,     avx512::apply,       avx512::clamp,
    avx512::unit_sums, avx512::apply_units, avx512::add_penalty, avx512::measure_sum_sq};

}  // namespace gradkern::cpu
