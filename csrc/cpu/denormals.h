#pragma once

#include <cstdint>

#if defined(__x86_64__) || defined(__i386__)
#include <xmmintrin.h>
#endif

namespace gradkern::cpu {
namespace {

/// While it lives, this thread computes with subnormal numbers as IEEE 754 says.
/// `torch.set_flush_denormal(True)` makes only *some* threads flush them to zero, so that sums would depend
/// on which thread took a chunk.
class DenormalsKept {
 public:
#if defined(__x86_64__) || defined(__i386__)
  DenormalsKept() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~kFlushBits); }
  ~DenormalsKept() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kFlushBits = 0x8040;  // flush-to-zero, denormals-are-zero
  unsigned saved_;
#elif defined(__aarch64__)
  DenormalsKept() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ & ~kFlushBits) : "memory");
  }
  ~DenormalsKept() { asm volatile("msr fpcr, %0" : : "r"(saved_) : "memory"); }

 private:
  static constexpr uint64_t kFlushBits = uint64_t{1} << 24;
  uint64_t saved_;
#else
  DenormalsKept() {}  // nothing known to clear; a user-provided constructor keeps it "used"
#endif
  DenormalsKept(const DenormalsKept&) = delete;
};

}  // namespace
}  // namespace gradkern::cpu
