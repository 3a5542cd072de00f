#include "kernels.h"

#include <cstring>

#include "denormals.h"
#include "lanes_avx2.h"

namespace gradkern::cpu {
namespace avx2 {
#include "kernels.inl"
}  // namespace avx2

extern const Kernels k_avx2;
const Kernels k_avx2 = {"avx2",          avx2::measure,     avx2::apply,       avx2::clamp,
                        avx2::unit_sums, avx2::apply_units, avx2::add_penalty, avx2::measure_sum_sq};

}  // namespace gradkern::cpu
