#pragma once

#include <cstdint>

#include "../core/exponents.h"
#include "../core/plan.h"
#include "../core/span.h"

namespace gradkern::cpu {

/// Adds the elements of the chunks to the histograms of their tensors, `counts[tensor * kExponentColumns]`.
/// Several threads may add to the same histograms. Integer work only, the same for every instruction set.
void count_exponents(const Span* spans, const Chunk* chunks, int64_t count, int64_t* counts);

}  // namespace gradkern::cpu
