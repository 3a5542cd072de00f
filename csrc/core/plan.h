#pragma once

#include <cstdint>

#include "config.h"
#include "stats.h"

namespace gradkern {

/// Elements in a full chunk. Part of the numerical contract on the CPU: `sum_sq` is the sum of chunk
/// sums, so another value here gives other last bits. 256 KiB of float32: small enough to balance two
/// threads on a small model, large enough that the work per chunk hides the bookkeeping.
constexpr int64_t kChunkNumel = int64_t{1} << 16;

/// A piece of one tensor. Says where it lies in the tensor, never where the tensor lies in memory, so
/// a plan stays valid while gradients are freed and allocated anew between steps.
struct Chunk {
  int64_t offset = 0;  ///< first element, counted within the tensor
  int32_t tensor = 0;  ///< index of the tensor in the list
  int32_t length = 0;  ///< elements, 1 to `kChunkNumel`
};
static_assert(sizeof(Chunk) == 16, "chunk tables are copied to devices as they are");

/// Chunks that a tensor of `numel` elements is cut into; an empty tensor has none.
GRADKERN_FN int64_t chunk_count(int64_t numel, int64_t chunk_numel = kChunkNumel) {
  return numel / chunk_numel + (numel % chunk_numel != 0);
}

/// Writes the chunks of tensor `tensor` to `chunks`, in the order of its elements, and returns the
/// first place behind them. The caller provides `chunk_count(numel, chunk_numel)` places.
GRADKERN_FN Chunk* plan(int32_t tensor, int64_t numel, Chunk* chunks, int64_t chunk_numel = kChunkNumel) {
  for (int64_t offset = 0; offset < numel; offset += chunk_numel) {
    const int64_t left = numel - offset;
    chunks->offset = offset;
    chunks->tensor = tensor;
    chunks->length = static_cast<int32_t>(left < chunk_numel ? left : chunk_numel);
    ++chunks;
  }
  return chunks;
}

/// Merges `count` records pairwise, neighbours first: always in the same order, whoever made them, and
/// with a rounding error that grows with the logarithm of `count`.
GRADKERN_FN Stats fold(const Stats* parts, int64_t count) {
  // A binary counter: `sums[level]` holds the merge of 2^level parts wherever that bit of `done` is set.
  Stats sums[64];
  for (int64_t done = 0; done < count; ++done) {
    Stats carry = parts[done];
    int level = 0;
    for (; (done >> level) & 1; ++level) carry = merge(sums[level], carry);
    sums[level] = carry;
  }
  Stats total;
  for (int level = 0; level < 63; ++level) {
    if ((count >> level) & 1) total = merge(sums[level], total);
  }
  return total;
}

}  // namespace gradkern
