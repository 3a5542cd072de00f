// The kernels, written once on the lanes of whichever instruction set includes this file inside its
// namespace. Everything here has internal linkage: see core/config.h for why that matters.

namespace {

/// Elements between two looks for non-finite values: few enough to be still in the first-level cache
/// when a block has to be read again.
constexpr int64_t kBlock = 2048;

/// How far ahead of the sums memory is asked for. The hardware's own prefetch stops at every page; this
/// carries the stream across the boundary.
constexpr int64_t kPrefetchBytes = 4096;

template <class T>
inline void prefetch_step(const T* p) {
  for (size_t line = 0; line < kSumLanes * sizeof(T); line += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes + line);
  }
}

inline F64 add_square(F64 sum, F32 x) { return add_exact_square(sum, widen(x)); }
inline F64 add_square(F64 sum, F64 x) { return add(sum, mul(x, x)); }

inline uint32_t scalar_magnitude(float x) { return float_bits(x) & 0x7fffffffu; }
inline uint32_t scalar_magnitude(BFloat16 x) { return scalar_magnitude(to_float(x)); }
inline uint32_t scalar_magnitude(Float16 x) { return scalar_magnitude(to_float(x)); }
inline uint64_t scalar_magnitude(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffffffffffffu;
}

inline double from_magnitude(uint32_t bits) { return bits_float(bits); }
inline double from_magnitude(uint64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

constexpr uint32_t inf_magnitude(uint32_t) { return 0x7f800000u; }
constexpr uint64_t inf_magnitude(uint64_t) { return 0x7ff0000000000000u; }

/// What the elements of type T are computed with: 16 of them, their magnitudes, one magnitude.
template <class T>
struct Lanes {
  using Values = decltype(load(static_cast<const T*>(nullptr)));
  using Bits = decltype(magnitude(Values{}));
  using Magnitude = decltype(scalar_magnitude(T{}));
  static constexpr Magnitude kInf = inf_magnitude(Magnitude{});

  static Bits no_bits() { return GRADKERN_ISA::no_bits(static_cast<Bits*>(nullptr)); }
  static Magnitude largest(Bits bits) {
    Magnitude lanes[16], most = 0;
    store(lanes, bits);
    for (const Magnitude lane : lanes) most = lane > most ? lane : most;
    return most;
  }
  static double sum(Bits counts) {
    Magnitude lanes[16], total = 0;
    store(lanes, counts);
    for (const Magnitude lane : lanes) total += lane;
    return static_cast<double>(total);
  }
};

/// The 32 lanes of a chunk's sum of squares.
struct Sums {
  F64 even = broadcast(0.0), odd = broadcast(0.0);  // lanes 0 to 15 and 16 to 31

  double fold() const {
    double lanes[16];
    store(lanes, add(even, odd));
    for (int half = 8; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
  }
};

/// Adds a block that holds NaN or Inf: the finite elements to the lanes they belong to, the others to the
/// counts. Returns the largest finite magnitude.
template <class T>
auto measure_nonfinite_block(const T* block, int64_t length, Sums& sums, Stats& stats) {
  using L = Lanes<T>;
  double lanes[kSumLanes];
  store(lanes, sums.even);
  store(lanes + 16, sums.odd);
  typename L::Magnitude largest = 0;
  for (int64_t i = 0; i < length; ++i) {
    const auto bits = scalar_magnitude(block[i]);
    if (bits < L::kInf) {
      const double value = from_magnitude(bits);
      lanes[i % kSumLanes] += value * value;
      if (bits > largest) largest = bits;
    } else if (bits == L::kInf) {
      stats.inf_count += 1;
    } else {
      stats.nan_count += 1;
    }
  }
  sums.even = load(lanes);
  sums.odd = load(lanes + 16);
  return largest;
}

/// The statistics of one chunk. `after_block(block, length, largest finite magnitude, any non-finite)`
/// is called when a block has been read and may change it.
template <class T, class AfterBlock>
inline Stats measure_chunk(T* data, int64_t length, AfterBlock after_block) {
  using L = Lanes<T>;
  Stats stats;
  Sums sums;
  typename L::Bits zeros = L::no_bits();
  typename L::Magnitude abs_max = 0;
  int64_t padding = 0;
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    T* const block = data + begin;
    const int64_t count = length - begin < kBlock ? length - begin : kBlock;
    const Sums before = sums;
    typename L::Bits most = L::no_bits();
    const auto step = [&](const T* p) {
      const auto x = load(p), y = load(p + 16);
      sums.even = add_square(sums.even, x);
      sums.odd = add_square(sums.odd, y);
      const auto x_bits = magnitude(x), y_bits = magnitude(y);
      most = max(most, max(x_bits, y_bits));
      zeros = count_zeros(count_zeros(zeros, x_bits), y_bits);
    };
    int64_t i = 0;
    for (; i + kSumLanes <= count; i += kSumLanes) {
      prefetch_step(block + i);
      step(block + i);
    }
    if (i < count) {
      T rest[kSumLanes];
      memset(rest, 0, sizeof rest);
      memcpy(rest, block + i, (count - i) * sizeof(T));
      step(rest);
      padding = kSumLanes - (count - i);
    }
    auto largest = L::largest(most);
    const bool nonfinite = largest >= L::kInf;
    if (nonfinite) {
      sums = before;
      largest = measure_nonfinite_block(block, count, sums, stats);
    }
    abs_max = largest > abs_max ? largest : abs_max;
    after_block(block, count, largest, nonfinite);
  }
  stats.sum_sq = sums.fold();
  stats.abs_max = from_magnitude(abs_max);
  stats.zero_count = L::sum(zeros) - static_cast<double>(padding);
  return stats;
}

/// The product is taken in double and rounded once for float32 and float64. Halves are multiplied in
/// float32, which their rounding hides, unless the coefficient is too small to be a normal float32.
template <class T, bool kInDouble>
inline auto transform(typename Lanes<T>::Values x, double coef, double bound) {
  if constexpr (sizeof(T) == 8) {
    return clamp(mul(x, broadcast(coef)), broadcast(bound));
  } else {
    const F32 limit = broadcast(static_cast<float>(bound));
    if constexpr (kInDouble) return clamp(narrow(mul(widen(x), broadcast(coef))), limit);
    return clamp(mul(x, broadcast(static_cast<float>(coef))), limit);
  }
}

template <class T, bool kInDouble>
inline void transform_block(T* block, int64_t length, double coef, double bound) {
  int64_t i = 0;
  for (; i + 16 <= length; i += 16) {
    store(block + i, transform<T, kInDouble>(load(block + i), coef, bound));
  }
  if (i < length) {
    T rest[16];
    memset(rest, 0, sizeof rest);
    memcpy(rest, block + i, (length - i) * sizeof(T));
    store(rest, transform<T, kInDouble>(load(rest), coef, bound));
    memcpy(block + i, rest, (length - i) * sizeof(T));
  }
}

/// The same where NaN and Inf must not take part: they stay bit for bit, or become +0.
template <class T, bool kInDouble>
inline void transform_finite(T* block, int64_t length, double coef, double bound, bool zero) {
  using L = Lanes<T>;
  for (int64_t i = 0; i < length; i += 16) {
    const int64_t count = length - i < 16 ? length - i : 16;
    T group[16];
    memset(group, 0, sizeof group);
    memcpy(group, block + i, count * sizeof(T));
    store(group, transform<T, kInDouble>(load(group), coef, bound));
    for (int64_t k = 0; k < count; ++k) {
      if (scalar_magnitude(block[i + k]) < L::kInf) {
        block[i + k] = group[k];
      } else if (zero) {
        block[i + k] = T{};
      }
    }
  }
}

template <class T>
inline bool has_nonfinite(const T* block, int64_t length) {
  using L = Lanes<T>;
  typename L::Bits most = L::no_bits();
  int64_t i = 0;
  for (; i + 16 <= length; i += 16) most = max(most, magnitude(load(block + i)));
  auto largest = L::largest(most);
  for (; i < length; ++i) {
    const auto bits = scalar_magnitude(block[i]);
    if (bits > largest) largest = bits;
  }
  return largest >= L::kInf;
}

template <class T, bool kInDouble>
inline void apply_in(T* data, int64_t length, const Action& action) {
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    T* const block = data + begin;
    const int64_t count = length - begin < kBlock ? length - begin : kBlock;
    if (action.nonfinite != NonFinite::kPropagate && has_nonfinite(block, count)) {
      const bool zero = action.nonfinite == NonFinite::kZero;
      transform_finite<T, kInDouble>(block, count, action.coef, action.bound, zero);
    } else {
      transform_block<T, kInDouble>(block, count, action.coef, action.bound);
    }
  }
}

template <class T>
inline void apply_chunk(T* data, int64_t length, const Action& action) {
  const float coef = static_cast<float>(action.coef);
  const bool subnormal = coef < 0x1p-126f && action.coef != 0;
  if (sizeof(T) >= 4 || subnormal) {
    apply_in<T, true>(data, length, action);
  } else {
    apply_in<T, false>(data, length, action);
  }
}

template <class T>
inline Stats clamp_chunk(T* data, int64_t length, const Action& action) {
  const auto after_block = [&](T* block, int64_t count, auto largest, bool nonfinite) {
    Stats seen;
    seen.abs_max = from_magnitude(largest);
    seen.inf_count = nonfinite;
    if (changes(action, seen)) apply_chunk(block, count, action);
  };
  return measure_chunk(data, length, after_block);
}

template <class T>
inline double sum_sq_chunk(const T* data, int64_t length) {
  Sums sums;
  int64_t i = 0;
  for (; i + kSumLanes <= length; i += kSumLanes) {
    prefetch_step(data + i);
    sums.even = add_square(sums.even, load(data + i));
    sums.odd = add_square(sums.odd, load(data + i + 16));
  }
  if (i < length) {
    T rest[kSumLanes];
    memset(rest, 0, sizeof rest);
    memcpy(rest, data + i, (length - i) * sizeof(T));
    sums.even = add_square(sums.even, load(rest));
    sums.odd = add_square(sums.odd, load(rest + 16));
  }
  return sums.fold();
}

/// Calls `work(first element, length)` with the chunk's elements under their type.
template <class Work>
inline void visit(const Span& span, const Chunk& chunk, Work work) {
  switch (span.dtype) {
    case DType::kFloat32: return work(static_cast<float*>(span.data) + chunk.offset, chunk.length);
    case DType::kFloat64: return work(static_cast<double*>(span.data) + chunk.offset, chunk.length);
    case DType::kBFloat16: return work(static_cast<BFloat16*>(span.data) + chunk.offset, chunk.length);
    case DType::kFloat16: return work(static_cast<Float16*>(span.data) + chunk.offset, chunk.length);
  }
}

void measure(const Span* spans, const Chunk* chunks, int64_t count, Stats* partials) {
  const DenormalsKept guard;
  for (int64_t i = 0; i < count; ++i) {
    visit(spans[chunks[i].tensor], chunks[i], [&](auto* data, int64_t length) {
      partials[i] = measure_chunk(data, length, [](auto*, int64_t, auto, bool) {});
    });
  }
}

void apply(const Span* spans, const Chunk* chunks, int64_t count, const Action* actions) {
  const DenormalsKept guard;
  for (int64_t i = 0; i < count; ++i) {
    visit(spans[chunks[i].tensor], chunks[i],
          [&](auto* data, int64_t length) { apply_chunk(data, length, actions[chunks[i].tensor]); });
  }
}

void clamp(const Span* spans, const Chunk* chunks, int64_t count, const Action* actions, Stats* partials) {
  const DenormalsKept guard;
  for (int64_t i = 0; i < count; ++i) {
    visit(spans[chunks[i].tensor], chunks[i], [&](auto* data, int64_t length) {
      partials[i] = clamp_chunk(data, length, actions[chunks[i].tensor]);
    });
  }
}

void measure_sum_sq(const Span* spans, const Chunk* chunks, int64_t count, Stats* partials) {
  const DenormalsKept guard;
  for (int64_t i = 0; i < count; ++i) {
    visit(spans[chunks[i].tensor], chunks[i], [&](const auto* data, int64_t length) {
      partials[i] = Stats{};
      partials[i].sum_sq = sum_sq_chunk(data, length);
    });
  }
}

}  // namespace
