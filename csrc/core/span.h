#pragma once

#include <cstdint>

#include "config.h"

namespace gradkern {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

GRADKERN_FN int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

/// The memory of one gradient, seen as a flat array: any dense layout is one, in the order in which
/// its elements lie. Does not own the memory, and need not be aligned beyond its element.
struct Span {
  void* data = nullptr;
  int64_t numel = 0;
  DType dtype = DType::kFloat32;
};

}  // namespace gradkern
