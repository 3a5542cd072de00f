#pragma once

#include <type_traits>

#include "block.cuh"

/// A range of elements of any dtype, any length and any alignment, read 16 bytes at a time.

namespace gradkern::cuda {

/// What elements of type T are computed in, and how they are laid out.
template <class T>
struct Element;
template <>
struct Element<float> {
  using Real = float;
  using Bits = uint32_t;
  static constexpr int kFractionBits = 23, kExponentBits = 8;
};
template <>
struct Element<double> {
  using Real = double;
  using Bits = uint64_t;
  static constexpr int kFractionBits = 52, kExponentBits = 11;
};
template <>
struct Element<BFloat16> {
  using Real = float;
  using Bits = uint16_t;
  static constexpr int kFractionBits = 7, kExponentBits = 8;
};
template <>
struct Element<Float16> {
  using Real = float;
  using Bits = uint16_t;
  static constexpr int kFractionBits = 10, kExponentBits = 5;
};
template <class T>
using Real = typename Element<T>::Real;

GRADKERN_DEVICE float real(float x) { return x; }
GRADKERN_DEVICE double real(double x) { return x; }
GRADKERN_DEVICE float real(BFloat16 x) { return to_float(x); }
GRADKERN_DEVICE float real(Float16 x) {
#ifdef __CUDA_ARCH__  // one instruction for what core/half.h spells out
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  return to_float(x);
#endif
}

/// `x` rounded to T, to nearest even.
template <class T>
GRADKERN_DEVICE T narrow(Real<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return to_bfloat16(x);
  } else if constexpr (std::is_same_v<T, Float16>) {
#ifdef __CUDA_ARCH__
    Float16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(x));
    return half;
#else
    return to_float16(x);
#endif
  } else {
    return x;
  }
}

template <class T>
GRADKERN_DEVICE typename Element<T>::Bits bits_of(T element) {
  typename Element<T>::Bits bits;
  memcpy(&bits, &element, sizeof bits);
  return bits;
}

template <class T>
GRADKERN_DEVICE T from_bits(typename Element<T>::Bits bits) {
  T element;
  memcpy(&element, &bits, sizeof bits);
  return element;
}

/// Also false for NaN.
GRADKERN_DEVICE bool finite(float x) { return fabsf(x) < INFINITY; }
GRADKERN_DEVICE bool finite(double x) { return fabs(x) < INFINITY; }

template <class T>
constexpr int kWidth = 16 / static_cast<int>(sizeof(T));

/// The elements of 16 bytes.
template <class T>
struct Vector {
  T element[kWidth<T>];
};

template <class T>
GRADKERN_DEVICE Vector<T> elements(uint4 raw) {
  Vector<T> vector;
  memcpy(&vector, &raw, sizeof raw);
  return vector;
}

template <class T>
GRADKERN_DEVICE uint4 raw(const Vector<T>& vector) {
  uint4 raw;
  memcpy(&raw, &vector, sizeof raw);
  return raw;
}

/// One access of 16 bytes, through L2 only: nothing is used twice, and what is may have been written since.
/// The words are not a matter of taste: plain assignments of a `uint4` become four accesses on sm_100.
GRADKERN_DEVICE uint4 load(const uint4* address) { return __ldcg(address); }
GRADKERN_DEVICE void store(uint4* address, uint4 value) { __stcg(address, value); }

/// The threads that share a range: a block or a warp.
struct Team {
  int rank;
  int size;
};
GRADKERN_DEVICE Team block_team() { return {static_cast<int>(threadIdx.x), kBlock}; }
GRADKERN_DEVICE Team warp_team() { return {static_cast<int>(threadIdx.x % kWarp), kWarp}; }

/// What a thread loads at a time: `count` vectors that lie `stride` apart from `at`. The vectors beyond
/// `count` are zero bits.
struct Batch {
  uint4 vector[kLoads];
  int count;
  uint4* at;
  int stride;
};

/// Reads a range with a team. Every thread calls `one(address)` for at most one of the elements that lie
/// before the first 16-byte boundary or behind the last, then `many(batch)` for its share of the rest.
/// The four loads of a batch are issued together; those beyond the end are switched off one by one, so
/// that no length and no alignment has another, slower loop.
template <class T, class One, class Many>
GRADKERN_DEVICE void for_each(T* data, int length, Team team, One one, Many many) {
  const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T));
  const int to_boundary = (kWidth<T> - misaligned) % kWidth<T>;
  const int head = to_boundary < length ? to_boundary : length;
  const int vectors = (length - head) / kWidth<T>;
  const int peeled = length - vectors * kWidth<T>;
  if (team.rank < peeled) one(data + (team.rank < head ? team.rank : team.rank + vectors * kWidth<T>));

  uint4* const body = reinterpret_cast<uint4*>(data + head);
  for (int first = team.rank; first < vectors; first += kLoads * team.size) {
    Batch batch;
    batch.count = 0;
    batch.at = body + first;
    batch.stride = team.size;
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const bool inside = first + k * team.size < vectors;
      batch.vector[k] = inside ? load(batch.at + k * team.size) : uint4{0, 0, 0, 0};
      batch.count += inside;
    }
    many(batch);
  }
}

/// Calls `work(pointer to the first element)` with the element's type.
template <class Work>
GRADKERN_DEVICE void with_type(DType dtype, void* data, int64_t offset, Work work) {
  switch (dtype) {
    case DType::kFloat32: return work(static_cast<float*>(data) + offset);
    case DType::kFloat64: return work(static_cast<double*>(data) + offset);
    case DType::kBFloat16: return work(static_cast<BFloat16*>(data) + offset);
    case DType::kFloat16: return work(static_cast<Float16*>(data) + offset);
  }
}

}  // namespace gradkern::cuda
