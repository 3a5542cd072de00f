#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace gradkern::cpu {

extern const Kernels k_portable;
#if defined(__x86_64__)
extern const Kernels k_avx2;
extern const Kernels k_avx512;
#endif

int available(const Kernels* sets[kMaxSets]) {
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    sets[count++] = &k_avx512;
  }
  if (avx2) sets[count++] = &k_avx2;
#endif
  sets[count++] = &k_portable;
  return count;
}

namespace {

const Kernels* find(const char* isa) {
  const Kernels* sets[kMaxSets];
  const int count = available(sets);
  for (int i = 0; i < count; ++i) {
    if (strcmp(sets[i]->isa, isa) == 0) return sets[i];
  }
  return nullptr;
}

const char* asked_for() {
  const char* isa = getenv("GRADKERN_ISA");
  return isa != nullptr && *isa != '\0' ? isa : nullptr;
}

const Kernels* initial() {
  const char* isa = asked_for();
  if (isa != nullptr && find(isa) != nullptr) return find(isa);
  const Kernels* sets[kMaxSets];
  available(sets);
  return sets[0];
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> set{initial()};
  return set;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

bool select(const char* isa) {
  const Kernels* set = find(isa);
  if (set == nullptr) return false;
  current().store(set, std::memory_order_relaxed);
  return true;
}

const char* selection_problem() {
  const char* isa = asked_for();
  if (isa == nullptr || find(isa) != nullptr) return nullptr;
  return "GRADKERN_ISA names an instruction set that this build does not carry or this machine does not run";
}

}  // namespace gradkern::cpu
