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

inline F64 widen(F64 x) { return x; }
inline void round_to(F32& to, F64 x) { to = narrow(x); }
inline void round_to(F64& to, F64 x) { to = x; }

inline F64 add_square(F64 sum, F32 x) { return add_exact_square(sum, widen(x)); }
inline F64 add_square(F64 sum, F64 x) { return add(sum, mul(x, x)); }

/// Where element i of a step is summed: the place it has in the `Pair` of its dtype.
inline int lane(int64_t i, BFloat16) { return static_cast<int>(i % 2 * 16 + i % kSumLanes / 2); }
template <class T>
inline int lane(int64_t i, T) {
  return static_cast<int>(i % kSumLanes);
}

/// The bits of one element without the sign, and what they mean.
template <class T>
struct Magnitude;
template <>
struct Magnitude<float> {
  using Bits = uint32_t;
  static constexpr Bits kInf = 0x7f800000u;
  static Bits of(float x) { return float_bits(x) & 0x7fffffffu; }
  static double value(Bits bits) { return bits_float(bits); }
};
template <>
struct Magnitude<double> {
  using Bits = uint64_t;
  static constexpr Bits kInf = 0x7ff0000000000000u;
  static Bits of(double x) {
    Bits bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffffffffffffu;
  }
  static double value(Bits bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
  }
};
template <class Half, uint16_t kInfBits>
struct HalfMagnitude {
  using Bits = uint16_t;
  static constexpr Bits kInf = kInfBits;
  static Bits of(Half x) { return x.bits & 0x7fffu; }
  static double value(Bits bits) { return to_float(Half{bits}); }
};
template <>
struct Magnitude<BFloat16> : HalfMagnitude<BFloat16, 0x7f80u> {};
template <>
struct Magnitude<Float16> : HalfMagnitude<Float16, 0x7c00u> {};

template <class T>
inline auto largest_lane(Register most) {
  typename Magnitude<T>::Bits lanes[sizeof(Register) / sizeof(T)], largest = 0;
  store(lanes, most);
  for (const auto bits : lanes) largest = bits > largest ? bits : largest;
  return largest;
}

template <class T>
inline double sum_of_lanes(Register counts) {
  typename Magnitude<T>::Bits lanes[sizeof(Register) / sizeof(T)];
  store(lanes, counts);
  uint64_t sum = 0;
  for (const auto count : lanes) sum += count;
  return static_cast<double>(sum);
}

/// The 32 lanes of a chunk's sum of squares.
struct Sums {
  F64 first = broadcast(0.0), second = broadcast(0.0);

  template <class Values>
  void add_squares(const Pair<Values>& x) {
    first = add_square(first, x.first);
    second = add_square(second, x.second);
  }

  double fold() const {
    double lanes[16];
    store(lanes, add(first, second));
    for (int half = 8; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
  }
};

/// Calls `step` with the address of every 32 elements; the last ones come padded with zeros, from a copy.
/// Returns how many zeros that were.
template <class T, class Step>
inline int64_t for_steps(const T* data, int64_t length, Step step) {
  int64_t i = 0;
  for (; i + kSumLanes <= length; i += kSumLanes) {
    prefetch_step(data + i);
    step(data + i);
  }
  if (i == length) return 0;
  T rest[kSumLanes];
  memset(rest, 0, sizeof rest);
  memcpy(rest, data + i, (length - i) * sizeof(T));
  step(rest);
  return kSumLanes - (length - i);
}

/// Adds a block that holds NaN or Inf: the finite elements to the lanes they belong to, the others to the
/// counts. Returns the largest finite magnitude.
template <class T>
auto measure_nonfinite_block(const T* block, int64_t length, Sums& sums, Stats& stats) {
  using M = Magnitude<T>;
  double lanes[kSumLanes];
  store(lanes, sums.first);
  store(lanes + 16, sums.second);
  typename M::Bits largest = 0;
  for (int64_t i = 0; i < length; ++i) {
    const auto bits = M::of(block[i]);
    if (bits < M::kInf) {
      const double value = M::value(bits);
      lanes[lane(i, T{})] += value * value;
      if (bits > largest) largest = bits;
    } else if (bits == M::kInf) {
      stats.inf_count += 1;
    } else {
      stats.nan_count += 1;
    }
  }
  sums.first = load(lanes);
  sums.second = load(lanes + 16);
  return largest;
}

/// The statistics of one chunk. `after_block(block, length, largest finite magnitude, any non-finite)`
/// is called when a block has been read and may change it.
template <class T, class AfterBlock>
inline Stats measure_chunk(T* data, int64_t length, AfterBlock after_block) {
  using M = Magnitude<T>;
  Stats stats;
  Sums sums;
  Register zeros = no_bits();
  typename M::Bits abs_max = 0;
  int64_t padding = 0;
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    T* const block = data + begin;
    const int64_t count = length - begin < kBlock ? length - begin : kBlock;
    const Sums before = sums;
    Register most = no_bits();
    padding += for_steps(block, count, [&](const T* p) {
      const auto bits = load_bits(p);
      sums.add_squares(values(bits, T{}));
      most = max_magnitude(most, magnitude(bits));
      zeros = count_zeros(zeros, magnitude(bits));
    });
    auto largest = largest_lane<T>(most);
    const bool nonfinite = largest >= M::kInf;
    if (nonfinite) {
      sums = before;
      largest = measure_nonfinite_block(block, count, sums, stats);
    }
    abs_max = largest > abs_max ? largest : abs_max;
    after_block(block, count, M::value(largest), nonfinite);
  }
  stats.sum_sq = sums.fold();
  stats.abs_max = M::value(abs_max);
  stats.zero_count = sum_of_lanes<T>(zeros) - static_cast<double>(padding);
  return stats;
}

/// The product is taken in double and rounded once for float32 and float64. Halves are multiplied in
/// float32, which their own rounding hides, unless the coefficient is too small to be a normal float32. So is
/// float32 where the coefficient is 1, since that is exact.
template <bool kInDouble>
inline F32 transform(F32 x, double coef, double bound) {
  const F32 limit = broadcast(static_cast<float>(bound));
  if constexpr (kInDouble) return clamp(narrow(mul(widen(x), broadcast(coef))), limit);
  return clamp(mul(x, broadcast(static_cast<float>(coef))), limit);
}
template <bool kInDouble>
inline F64 transform(F64 x, double coef, double bound) {
  return clamp(mul(x, broadcast(coef)), broadcast(bound));
}

/// Transforms 32 elements.
template <class T, bool kInDouble>
inline void transform_step(T* p, double coef, double bound) {
  auto pair = values(load_bits(p), T{});
  pair.first = transform<kInDouble>(pair.first, coef, bound);
  pair.second = transform<kInDouble>(pair.second, coef, bound);
  store_bits(p, bits_of(pair, T{}));
}

template <class T, bool kInDouble>
inline void transform_block(T* block, int64_t length, double coef, double bound) {
  int64_t i = 0;
  for (; i + kSumLanes <= length; i += kSumLanes) {
    prefetch_step(block + i);
    transform_step<T, kInDouble>(block + i, coef, bound);
  }
  if (i < length) {
    T rest[kSumLanes];
    memset(rest, 0, sizeof rest);
    memcpy(rest, block + i, (length - i) * sizeof(T));
    transform_step<T, kInDouble>(rest, coef, bound);
    memcpy(block + i, rest, (length - i) * sizeof(T));
  }
}

/// The same where NaN and Inf must not take part: they stay bit for bit, or become +0.
template <class T, bool kInDouble>
inline void transform_finite(T* block, int64_t length, double coef, double bound, bool zero) {
  using M = Magnitude<T>;
  for (int64_t i = 0; i < length; i += kSumLanes) {
    const int64_t count = length - i < kSumLanes ? length - i : kSumLanes;
    T group[kSumLanes];
    memset(group, 0, sizeof group);
    memcpy(group, block + i, count * sizeof(T));
    transform_step<T, kInDouble>(group, coef, bound);
    for (int64_t k = 0; k < count; ++k) {
      if (M::of(block[i + k]) < M::kInf) {
        block[i + k] = group[k];
      } else if (zero) {
        block[i + k] = T{};
      }
    }
  }
}

template <class T>
inline bool has_nonfinite(const T* block, int64_t length) {
  Register most = no_bits();
  for_steps(block, length, [&](const T* p) { most = max_magnitude(most, magnitude(load_bits(p))); });
  return largest_lane<T>(most) >= Magnitude<T>::kInf;
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
  const bool subnormal = static_cast<float>(action.coef) < 0x1p-126f && action.coef != 0;
  if (subnormal || (sizeof(T) >= 4 && action.coef != 1)) {
    apply_in<T, true>(data, length, action);
  } else {
    apply_in<T, false>(data, length, action);
  }
}

template <class T>
inline Stats clamp_chunk(T* data, int64_t length, const Action& action) {
  return measure_chunk(data, length, [&](T* block, int64_t count, double abs_max, bool nonfinite) {
    Stats seen;
    seen.abs_max = abs_max;
    seen.inf_count = nonfinite;
    if (changes(action, seen)) apply_chunk(block, count, action);
  });
}

template <class T>
inline double sum_sq_chunk(const T* data, int64_t length) {
  Sums sums;
  for_steps(data, length, [&](const T* p) { sums.add_squares(values(load_bits(p), T{})); });
  return sums.fold();
}

/// The statistics of elements that may be more than one chunk.
template <class T>
inline Stats measure_long(T* data, int64_t length) {
  const auto leave = [](T*, int64_t, double, bool) {};
  if (length <= kChunkNumel) return measure_chunk(data, length, leave);
  Folder<Stats> folder;
  for (int64_t begin = 0; begin < length; begin += kChunkNumel) {
    const int64_t count = length - begin < kChunkNumel ? length - begin : kChunkNumel;
    folder.add(measure_chunk(data + begin, count, leave));
  }
  return folder.total();
}

template <class T>
inline double add_penalty_chunk(T* grads, const T* weights, int64_t length, double l1, double l2) {
  Sums sums;
  // A term that is not wanted is left out, not multiplied by 0: a weight may be Inf.
  const auto value = [&](F64 w) {
    F64 sum = broadcast(0.0);
    if (l1 != 0) sum = add(sum, mul(broadcast(l1), abs(w)));
    if (l2 != 0) sum = add(sum, mul(broadcast(l2), mul(w, w)));
    return sum;
  };
  const auto gradient = [&](F64 w) {
    F64 sum = broadcast(0.0);
    if (l1 != 0) sum = add(sum, mul(broadcast(l1), sign(w)));
    if (l2 != 0) sum = add(sum, mul(broadcast(2 * l2), w));
    return sum;
  };
  const auto step = [&](T* g, const T* w) {
    auto grad = values(load_bits(g), T{});
    const auto weight = values(load_bits(w), T{});
    sums.first = add(sums.first, value(widen(weight.first)));
    sums.second = add(sums.second, value(widen(weight.second)));
    round_to(grad.first, add(widen(grad.first), gradient(widen(weight.first))));
    round_to(grad.second, add(widen(grad.second), gradient(widen(weight.second))));
    store_bits(g, bits_of(grad, T{}));
  };
  int64_t i = 0;
  for (; i + kSumLanes <= length; i += kSumLanes) {
    prefetch_step(grads + i);
    prefetch_step(weights + i);
    step(grads + i, weights + i);
  }
  if (i < length) {
    T rest_grads[kSumLanes], rest_weights[kSumLanes];
    memset(rest_grads, 0, sizeof rest_grads);
    memset(rest_weights, 0, sizeof rest_weights);
    memcpy(rest_grads, grads + i, (length - i) * sizeof(T));
    memcpy(rest_weights, weights + i, (length - i) * sizeof(T));
    step(rest_grads, rest_weights);
    memcpy(grads + i, rest_grads, (length - i) * sizeof(T));
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
    visit(spans[chunks[i].tensor], chunks[i],
          [&](auto* data, int64_t length) { partials[i] = measure_long(data, length); });
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

/// Calls `work(first element, numel, number of the unit among all)` for every unit of a range.
template <class Work>
inline void for_units(const Span* spans, const Units* units, const UnitRange& range, Work work) {
  const Units& of = units[range.tensor];
  visit(spans[range.tensor], Chunk{}, [&](auto* data, int64_t) {
    for (int64_t unit = range.begin; unit < range.end; ++unit) {
      work(data + unit * of.numel, of.numel, of.first + unit);
    }
  });
}

void unit_sums(const Span* spans, const Units* units, const UnitRange* ranges, int64_t count,
               double* sum_sq) {
  const DenormalsKept guard;
  for (int64_t i = 0; i < count; ++i) {
    for_units(spans, units, ranges[i], [&](auto* data, int64_t numel, int64_t unit) {
      sum_sq[unit] = measure_long(data, numel).sum_sq;
    });
  }
}

void apply_units(const Span* spans, const Units* units, const UnitRange* ranges, int64_t count,
                 const Action* actions, const double* coefs) {
  const DenormalsKept guard;
  for (int64_t i = 0; i < count; ++i) {
    Action action = actions[ranges[i].tensor];
    for_units(spans, units, ranges[i], [&](auto* data, int64_t numel, int64_t unit) {
      action.coef = coefs[unit];
      if (action.coef != 1 || action.bound < INFINITY || action.nonfinite == NonFinite::kZero) {
        apply_chunk(data, numel, action);
      }
    });
  }
}

void add_penalty(const Span* grads, const Span* weights, const Chunk* chunks, int64_t count, double l1,
                 double l2, double* values) {
  const DenormalsKept guard;
  for (int64_t i = 0; i < count; ++i) {
    visit(grads[chunks[i].tensor], chunks[i], [&](auto* data, int64_t length) {
      const auto* weight = static_cast<decltype(data)>(weights[chunks[i].tensor].data) + chunks[i].offset;
      values[i] = add_penalty_chunk(data, weight, length, l1, l2);
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
