#include "exponents.h"

#include <cstring>

namespace gradkern::cpu {
namespace {

template <class Bits, int kFractionBits, int kExponentBits>
void count_chunk(const char* data, const Chunk& chunk, int64_t* counts) {
  constexpr Bits kSign = static_cast<Bits>(Bits{1} << (kFractionBits + kExponentBits));
  const char* const first = data + chunk.offset * static_cast<int64_t>(sizeof(Bits));
  // Neighbours often share an exponent; two histograms in turn keep one addition from waiting for the other.
  int32_t seen[2][kExponentColumns] = {};
  for (int32_t i = 0; i < chunk.length; ++i) {
    Bits bits;
    memcpy(&bits, first + i * sizeof(Bits), sizeof bits);
    ++seen[i % 2][exponent_column(static_cast<Bits>(bits & ~kSign), kFractionBits, kExponentBits)];
  }
  for (int column = 0; column < kExponentColumns; ++column) {
    const int32_t found = seen[0][column] + seen[1][column];
    if (found != 0) __atomic_fetch_add(counts + column, int64_t{found}, __ATOMIC_RELAXED);
  }
}

}  // namespace

void count_exponents(const Span* spans, const Chunk* chunks, int64_t count, int64_t* counts) {
  for (int64_t i = 0; i < count; ++i) {
    const Span& span = spans[chunks[i].tensor];
    const char* const data = static_cast<const char*>(span.data);
    int64_t* const histogram = counts + int64_t{chunks[i].tensor} * kExponentColumns;
    switch (span.dtype) {
      case DType::kFloat32: count_chunk<uint32_t, 23, 8>(data, chunks[i], histogram); break;
      case DType::kFloat64: count_chunk<uint64_t, 52, 11>(data, chunks[i], histogram); break;
      case DType::kBFloat16: count_chunk<uint16_t, 7, 8>(data, chunks[i], histogram); break;
      case DType::kFloat16: count_chunk<uint16_t, 10, 5>(data, chunks[i], histogram); break;
    }
  }
}

}  // namespace gradkern::cpu
