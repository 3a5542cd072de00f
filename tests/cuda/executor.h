#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

/// Runs CUDA kernels on the CPU, one fiber for each thread, and watches every access to memory.
///
/// The kernels' sources are compiled as plain C++ with `-fsanitize=thread`, which calls a function before
/// each access; here those functions are the executor's own. They stop a launch at the first access that
///
///   - touches a byte outside of what was allocated, or is not aligned to its size;
///   - reads a byte that was never written;
///   - races: an earlier access by another thread to the same place, one of the two a write, with nothing
///   that
///     orders them. Order comes from barriers, shuffles and, between blocks, from a fence, an atomic and a
///     fence again, as in the memory model of CUDA; what happened to be executed first does not count.
///
/// It also stops at barriers that not all threads of a block reach, and shuffles that not all named lanes
/// reach. Which thread runs next is drawn from a seed, at every barrier, shuffle and atomic, and at some of
/// the other accesses. A few blocks are resident at a time, in an order drawn from the seed too.
///
/// Not simulated: time, caches and weak memory (a stale value is never seen, though the race that allows one
/// is reported), and what nvcc and ptxas make of the sources.

namespace executor {

constexpr int kWarp = 32;

struct Index {
  unsigned x;
};
/// What the built-in variables of a CUDA thread say.
struct Thread {
  Index thread, block, grid;
};

// What kernels call, through cuda_on_cpu.h.

Thread current_thread();
int lane();
/// Waits for all threads of the block; true if the predicate was true in any.
bool barrier(bool predicate);
void fence();
/// Waits for all lanes in `mask`, and gives the value of `source`; of this lane, where that is none.
uint64_t shuffle_bits(unsigned mask, uint64_t bits, int source);
/// Checks an access that the compiler is not to check piece by piece. The caller then carries it out.
void plain_access(const void* address, size_t bytes, bool write);
/// Checks and orders an atomic access. The caller then carries it out.
void atomic_access(const void* address, size_t bytes);

template <class T>
T shuffle(unsigned mask, T value, int source) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle_bits(mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T, class Update>
__attribute__((noinline, no_sanitize_thread)) T atomic(T* address, Update update) {
  atomic_access(address, sizeof(T));
  const T old = *address;
  *address = update(old);
  return old;
}

// What tests call.

/// Forgets all memory.
void reset();

/// Device memory, `misalignment` bytes behind a multiple of 256, with bytes around it that belong to nobody.
/// Without `initial` it counts as never written.
void* allocate(const char* name, size_t bytes, size_t misalignment, const void* initial);

/// Copies device memory to the host. False if some of it was never written.
bool read(const void* device, void* host, size_t bytes);

/// What launches read from and wrote to device memory between two addresses.
struct Traffic {
  const char* begin = nullptr;
  const char* end = nullptr;
  int64_t read_bytes = 0, written_bytes = 0;
  int64_t first = -1;  ///< where the first access of all was, in bytes from `begin`
};

/// Runs a kernel to its end and returns an empty string, or says what stopped it. `kernel` is called by every
/// thread, and is to pass the arguments by value, so that they lie on the thread's own stack.
std::string launch(const std::function<void()>& kernel, int grid, int block, uint64_t seed, Traffic* traffic);

}  // namespace executor
