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

/// Merges records pairwise, neighbours first, as they come: always in the same order, whoever made them, and
/// with a rounding error that grows with the logarithm of their number. `T` needs a `merge`.
template <class T>
struct Folder {
  T sums[63];  ///< a binary counter: `sums[level]` holds 2^level parts where that bit of `count` is set
  int64_t count = 0;

  GRADKERN_MEMBER void add(T part) {
    int level = 0;
    for (; (count >> level) & 1; ++level) part = merge(sums[level], part);
    sums[level] = part;
    ++count;
  }

  GRADKERN_MEMBER T total() const {
    T all{};
    for (int level = 0; level < 63; ++level) {
      if ((count >> level) & 1) all = merge(sums[level], all);
    }
    return all;
  }
};

template <class T>
GRADKERN_FN T fold(const T* parts, int64_t count) {
  if (count == 1) return parts[0];  // most tensors are one chunk
  Folder<T> folder;
  for (int64_t i = 0; i < count; ++i) folder.add(parts[i]);
  return folder.total();
}

/// How a tensor divides into units: its slices along dim 0 (output neurons, output channels) if it has two or
/// more dimensions, else the whole of it. Units of all tensors are numbered one after the other.
struct Units {
  int64_t count = 0;
  int64_t numel = 0;  ///< of one unit; the units of a dense tensor lie one behind the other
  int64_t first = 0;  ///< number of the tensor's first unit
};

/// Some whole units of one tensor: the piece that unit kernels work on.
struct UnitRange {
  int64_t begin = 0, end = 0;  ///< counted within the tensor
  int32_t tensor = 0;
};

/// Units that make a range: about a chunk of elements.
GRADKERN_FN int64_t units_per_range(const Units& units) {
  return units.numel >= kChunkNumel || units.numel == 0 ? 1 : kChunkNumel / units.numel;
}

}  // namespace gradkern
