#include "cpu/denormals.h"

#include "check.h"
#include "cpu/kernels.h"
#include "data.h"

using namespace gradkern;

namespace {

#if defined(__x86_64__)

/// Flushes subnormal numbers to zero in this thread, as `torch.set_flush_denormal(True)` does.
class Flushing {
 public:
  Flushing() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~Flushing() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
};

TEST(the_mode_is_cleared_inside_and_put_back_after) {
  const Flushing flushing;
  {
    const cpu::DenormalsKept guard;
    CHECK_EQUAL(_mm_getcsr() & 0x8040u, 0u);
  }
  CHECK_EQUAL(_mm_getcsr() & 0x8040u, 0x8040u);
}

TEST(no_kernel_flushes_and_every_kernel_puts_the_mode_back) {
  const cpu::Kernels* sets[cpu::kMaxSets];
  const int count = cpu::available(sets);
  const std::vector<Chunk> chunks = data::chunks_of(100);
  for (int k = 0; k < count; ++k) {
    for (const DType dtype : data::kDTypes) {
      const std::string context = std::string(sets[k]->isa) + " " + data::name(dtype);
      // Subnormal, and so is a half of it.
      const double tiny = dtype == DType::kFloat64   ? 0x1p-1030
                          : dtype == DType::kFloat16 ? 0x1p-20
                                                     : 0x1p-130;
      data::Gradient gradient(dtype, 100);
      for (int64_t i = 0; i < 100; ++i) gradient.set(i, tiny * static_cast<double>(1 + i % 3));
      const Span span = gradient.span();
      const Action halve = {0.5, INFINITY, NonFinite::kKeep};
      const Action bound = {1, tiny / 2, NonFinite::kKeep};
      Stats measured, clamped;
      unsigned mode;
      {
        const Flushing flushing;
        sets[k]->measure(&span, chunks.data(), 1, &measured);
        sets[k]->apply(&span, chunks.data(), 1, &halve);
        const data::Gradient halved = gradient;
        sets[k]->clamp(&span, chunks.data(), 1, &bound, &clamped);
        mode = _mm_getcsr();
        for (int64_t i = 0; i < 100; ++i) CHECK(halved.same_bits(gradient, i) == (i % 3 == 0));
      }
      CHECK_EQUAL_IN(context, mode & 0x8040u, 0x8040u);
      CHECK_EQUAL_IN(context, measured.zero_count, 0.0);
      CHECK_EQUAL_IN(context, measured.abs_max, 3 * tiny);
      CHECK_EQUAL_IN(context, clamped.zero_count, 0.0);
      CHECK_EQUAL_IN(context, clamped.abs_max, 1.5 * tiny);
      for (int64_t i = 0; i < 100; ++i) CHECK_EQUAL_IN(context, gradient[i], tiny / 2);
    }
  }
}

#else

TEST(the_guard_can_be_made_where_there_is_nothing_to_clear) { const cpu::DenormalsKept guard; }

#endif

}  // namespace
