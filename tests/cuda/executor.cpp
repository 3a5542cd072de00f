#include "executor.h"

#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <new>
#include <random>
#include <vector>

// The linker gives a section's bounds these names.
extern "C" char __start_shared_memory[] __attribute__((visibility("hidden")));
extern "C" char __stop_shared_memory[] __attribute__((visibility("hidden")));

namespace executor {
namespace {

constexpr size_t kArenaBytes = size_t{1} << 25;
constexpr size_t kStackBytes = size_t{1} << 16;
constexpr size_t kResidentBlocks = 4;
constexpr int64_t kMostAccesses = 50'000'000;
constexpr unsigned kAccessesPerSwitch = 97;  // on average, beside the switches at barriers and the like

/// For every thread of the grid, up to which of its steps its accesses are known to lie in the past.
using Clock = std::vector<uint32_t>;
using SharedClock = std::shared_ptr<const Clock>;

SharedClock join(const SharedClock& a, const SharedClock& b) {
  if (!a || a == b) return b;
  if (!b) return a;
  auto both = std::make_shared<Clock>(*a);
  for (size_t i = 0; i < both->size(); ++i) (*both)[i] = std::max((*both)[i], (*b)[i]);
  return both;
}

enum class Access : uint32_t { kRead = 0, kWrite = 1, kAtomic = 2 };

/// An access in the past.
struct Entry {
  uint32_t thread_and_access = 0;  // (thread + 1) * 4 + access; 0 is none
  uint32_t step = 0;

  bool none() const { return thread_and_access == 0; }
  uint32_t thread() const { return thread_and_access / 4 - 1; }
  Access access() const { return static_cast<Access>(thread_and_access % 4); }
};

/// The last accesses to two bytes: the last write, and some of the reads and atomics after it.
struct Cell {
  Entry write;
  Entry others[3];
};

/// What is known of a range of memory beside its contents.
enum class State : uint8_t { kNobodys = 0, kUnwritten = 1, kWritten = 2 };
struct Shadow {
  State* state;  // of each byte
  Cell* cells;   // of each two bytes
};

enum class Waiting { kNo, kBarrier, kShuffle };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  int block = 0, thread = 0;
  uint32_t id = 0;
  uint32_t step = 1;
  SharedClock seen;      // of the other threads
  SharedClock pending;   // met by an atomic; seen after the next fence
  SharedClock released;  // at the last fence; what the next atomic publishes
  Waiting waiting = Waiting::kNo;
  bool result = false;  // of a barrier
};

struct Warp {
  unsigned arrived = 0, mask = 0;
  uint64_t values[kWarp], results[kWarp];
  int sources[kWarp];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<int> runnable;
  std::vector<Warp> warps;
  int at_barrier = 0, ended = 0;
  const void* barrier_site = nullptr;
  bool any = false;
  std::vector<char> shared;  // while another block's lies in the section
  std::vector<State> shared_state;
  std::vector<Cell> shared_cells;
};

struct Allocation {
  std::string name;
  const char* begin;
  size_t bytes;
};

char* arena = nullptr;
Shadow arena_shadow;
size_t arena_used = 0;
std::vector<Allocation> allocations;
char* stacks = nullptr;

// The launch under way.
const std::function<void()>* kernel = nullptr;
std::vector<std::unique_ptr<Block>> resident;
Block* current_block = nullptr;
Fiber* current = nullptr;
void* scheduler_stack_pointer = nullptr;
int grid_size = 0, block_size = 0;
std::minstd_rand random_engine;
unsigned until_switch = 0;
int64_t accesses = 0;
std::vector<std::pair<const void*, SharedClock>> atomics;
Traffic* traffic = nullptr;
std::string failure;

unsigned draw(unsigned below) { return static_cast<unsigned>(random_engine() >> 3) % below; }

#if defined(__x86_64__)
// Saves what a called function must preserve, and the stack pointer; then the same backwards.
extern "C" void executor_switch(void** save, void* load);
asm(R"(
.text
executor_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#else
#error "the executor switches stacks on x86-64 only"
#endif

void leave_to_scheduler() { executor_switch(&current->stack_pointer, scheduler_stack_pointer); }

[[noreturn]] void fail(const std::string& what) {
  failure =
      what + ", in block " + std::to_string(current->block) + ", thread " + std::to_string(current->thread);
  leave_to_scheduler();  // which never comes back to a launch that failed
  __builtin_unreachable();
}

void make_runnable(Block& block, Fiber& fiber) {
  fiber.waiting = Waiting::kNo;
  block.runnable.push_back(fiber.thread);
}

void yield() {
  make_runnable(*current_block, *current);
  leave_to_scheduler();
}

void run_fiber() {
  (*kernel)();
  ++current_block->ended;
  leave_to_scheduler();
}

bool in_the_past(const Entry& entry) {
  return entry.thread() == current->id || entry.step <= (*current->seen)[entry.thread()];
}

/// All members have seen what each has seen and done.
template <class Members>
void meet(const Members& members) {
  SharedClock joined;
  for (const Fiber* fiber : members) joined = join(joined, fiber->seen);
  auto all = std::make_shared<Clock>(*joined);
  for (const Fiber* fiber : members) (*all)[fiber->id] = fiber->step;
  for (Fiber* fiber : members) {
    fiber->seen = all;
    ++fiber->step;
  }
}

/// Everything the current thread has seen and done so far.
SharedClock everything() {
  auto all = std::make_shared<Clock>(*current->seen);
  (*all)[current->id] = current->step;
  return all;
}

std::string describe(const char* address) {
  if (address >= __start_shared_memory && address < __stop_shared_memory) {
    return "shared memory + " + std::to_string(address - __start_shared_memory);
  }
  const Allocation* before = nullptr;
  for (const Allocation& allocation : allocations) {
    if (allocation.begin <= address) before = &allocation;
  }
  if (before == nullptr) return "no memory of the kernel";
  return before->name + " (" + std::to_string(before->bytes) + " bytes) + " +
         std::to_string(address - before->begin);
}

/// The shadow of an address; false where there is none.
bool find_shadow(const char* address, Shadow& shadow) {
  if (address >= arena && address < arena + kArenaBytes) {
    shadow = {arena_shadow.state + (address - arena), arena_shadow.cells + (address - arena) / 2};
    return true;
  }
  if (address >= __start_shared_memory && address < __stop_shared_memory) {
    const size_t offset = address - __start_shared_memory;
    shadow = {current_block->shared_state.data() + offset, current_block->shared_cells.data() + offset / 2};
    return true;
  }
  return false;
}

bool conflict(const Entry& entry, Access access) {
  if (entry.none() || (entry.access() == Access::kRead && access == Access::kRead)) return false;
  if (entry.access() == Access::kAtomic && access == Access::kAtomic) return false;
  return !in_the_past(entry);
}

void record(Cell& cell, Access access) {
  const Entry mine{(current->id + 1) * 4 + static_cast<uint32_t>(access), current->step};
  if (access == Access::kWrite) {
    cell = Cell{};
    cell.write = mine;
    return;
  }
  for (Entry& entry : cell.others) {
    if (entry.none() || (entry.access() == access && in_the_past(entry))) {
      entry = mine;
      return;
    }
  }
  cell.others[draw(3)] = mine;
}

void check(const char* address, size_t bytes, Access access) {
  if (address >= current->stack && address < current->stack + kStackBytes) return;
  const char* const verb = access == Access::kRead ? "read" : access == Access::kWrite ? "write" : "atomic";
  const auto name = [&] { return std::to_string(bytes) + "-byte " + verb + " of " + describe(address); };
  Shadow shadow;
  if (!find_shadow(address, shadow)) fail("bounds: " + name());
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail("alignment: " + name());
  for (size_t i = 0; i < bytes; ++i) {
    if (shadow.state[i] == State::kNobodys) fail("bounds: " + name());
    if (shadow.state[i] == State::kUnwritten && access != Access::kWrite) fail("uninitialised: " + name());
    shadow.state[i] = access == Access::kRead ? shadow.state[i] : State::kWritten;
  }
  for (size_t i = 0; i < (bytes + 1) / 2; ++i) {
    Cell& cell = shadow.cells[i];
    for (const Entry& entry : {cell.write, cell.others[0], cell.others[1], cell.others[2]}) {
      if (!conflict(entry, access)) continue;
      fail("race: " + name() + " with block " + std::to_string(entry.thread() / block_size) + ", thread " +
           std::to_string(entry.thread() % block_size));
    }
    record(cell, access);
  }
  if (address >= traffic->begin && address < traffic->end) {
    (access == Access::kRead ? traffic->read_bytes : traffic->written_bytes) += static_cast<int64_t>(bytes);
    if (traffic->first < 0) traffic->first = address - traffic->begin;
  }
  if (++accesses > kMostAccesses) fail("endless: too many accesses for any launch of the tests");
  if (--until_switch == 0) {
    until_switch = 1 + draw(2 * kAccessesPerSwitch);
    yield();
  }
}

std::unique_ptr<Block> start_block(int index, char* stack) {
  auto block = std::make_unique<Block>();
  const size_t shared_bytes = __stop_shared_memory - __start_shared_memory;
  block->shared.resize(shared_bytes);
  block->shared_state.assign(shared_bytes, State::kUnwritten);
  block->shared_cells.resize((shared_bytes + 1) / 2);
  block->fibers.resize(block_size);
  block->warps.resize(block_size / kWarp);
  const auto nothing = std::make_shared<const Clock>(static_cast<size_t>(grid_size) * block_size, 0);
  for (int thread = 0; thread < block_size; ++thread) {
    Fiber& fiber = block->fibers[thread];
    fiber.stack = stack + thread * kStackBytes;
    fiber.block = index;
    fiber.thread = thread;
    fiber.id = static_cast<uint32_t>(index) * block_size + thread;
    fiber.seen = fiber.released = nothing;
    // As `executor_switch` leaves a stack: six registers and where to return to, here a function entered as
    // if by a call, when the stack pointer is 8 off a multiple of 16.
    void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 2;
    *top = reinterpret_cast<void*>(run_fiber);
    fiber.stack_pointer = top - 6;
    block->runnable.push_back(thread);
  }
  return block;
}

/// Makes a block's shared memory the one in the section.
void turn_to(Block* block) {
  if (block == current_block) return;
  if (current_block) std::copy(__start_shared_memory, __stop_shared_memory, current_block->shared.begin());
  std::copy(block->shared.begin(), block->shared.end(), __start_shared_memory);
  current_block = block;
}

std::string waiting_threads() {
  for (const auto& block : resident) {
    for (const Fiber& fiber : block->fibers) {
      if (fiber.waiting == Waiting::kNo) continue;
      return std::string("deadlock: a ") + (fiber.waiting == Waiting::kBarrier ? "barrier" : "shuffle") +
             " that not all threads reach, in block " + std::to_string(fiber.block) + ", thread " +
             std::to_string(fiber.thread);
    }
  }
  return "deadlock";
}

void run_blocks() {
  std::vector<int> to_start(grid_size);
  for (int i = 0; i < grid_size; ++i) to_start[i] = i;
  std::shuffle(to_start.begin(), to_start.end(), random_engine);
  const size_t stack_bytes = kStackBytes * block_size;
  std::vector<char*> free_stacks;
  for (size_t i = 0; i < kResidentBlocks; ++i) free_stacks.push_back(stacks + i * stack_bytes);

  while (failure.empty()) {
    while (!to_start.empty() && resident.size() < kResidentBlocks) {
      resident.push_back(start_block(to_start.back(), free_stacks.back()));
      to_start.pop_back();
      free_stacks.pop_back();
    }
    if (resident.empty()) return;
    std::vector<Block*> ready;
    for (const auto& block : resident) {
      if (!block->runnable.empty()) ready.push_back(block.get());
    }
    if (ready.empty()) {
      failure = waiting_threads();
      return;
    }
    turn_to(ready[draw(static_cast<unsigned>(ready.size()))]);
    Block& block = *current_block;
    // The same block for a while: exchanging shared memory at every switch would be most of the work.
    for (unsigned left = 1 + draw(4 * block_size); left > 0 && !block.runnable.empty() && failure.empty();
         --left) {
      std::swap(block.runnable[draw(static_cast<unsigned>(block.runnable.size()))], block.runnable.back());
      current = &block.fibers[block.runnable.back()];
      block.runnable.pop_back();
      executor_switch(&scheduler_stack_pointer, current->stack_pointer);
    }
    if (block.ended == block_size) {
      free_stacks.push_back(block.fibers[0].stack);
      current_block = nullptr;
      resident.erase(
          std::find_if(resident.begin(), resident.end(), [&](auto& r) { return r.get() == &block; }));
    }
  }
}

void* reserve(size_t bytes) {
  void* const memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return memory;
}

}  // namespace

Thread current_thread() {
  return {{static_cast<unsigned>(current->thread)},
          {static_cast<unsigned>(current->block)},
          {static_cast<unsigned>(grid_size)}};
}

int lane() { return current->thread % kWarp; }

bool barrier(bool predicate) {
  Block& block = *current_block;
  const void* const site = __builtin_return_address(0);
  if (block.at_barrier > 0 && block.barrier_site != site) fail("barrier: threads wait at different ones");
  block.barrier_site = site;
  block.any = block.any || predicate;
  current->waiting = Waiting::kBarrier;
  if (++block.at_barrier == block_size) {
    std::vector<Fiber*> members;
    for (Fiber& fiber : block.fibers) {
      fiber.result = block.any;
      members.push_back(&fiber);
      make_runnable(block, fiber);
    }
    meet(members);
    block.at_barrier = 0;
    block.any = false;
  }
  leave_to_scheduler();
  return current->result;
}

uint64_t shuffle_bits(unsigned mask, uint64_t bits, int source) {
  Block& block = *current_block;
  const int first = current->thread / kWarp * kWarp, mine = lane();
  Warp& warp = block.warps[current->thread / kWarp];
  if (!(mask >> mine & 1)) fail("shuffle: the mask leaves out its own lane");
  if (warp.arrived != 0 && warp.mask != mask) fail("shuffle: lanes came with different masks");
  if (source >= 0 && source < kWarp && !(mask >> source & 1))
    fail("shuffle: from a lane outside of the mask");
  warp.mask = mask;
  warp.arrived |= 1u << mine;
  warp.values[mine] = bits;
  warp.sources[mine] = source >= 0 && source < kWarp ? source : mine;
  current->waiting = Waiting::kShuffle;
  if (warp.arrived == mask) {
    std::vector<Fiber*> members;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      warp.results[lane] = warp.values[warp.sources[lane]];
      members.push_back(&block.fibers[first + lane]);
      make_runnable(block, *members.back());
    }
    meet(members);
    warp.arrived = 0;
  }
  leave_to_scheduler();
  return current_block->warps[current->thread / kWarp].results[lane()];
}

void fence() {
  current->seen = join(current->seen, current->pending);
  current->pending = nullptr;
  current->released = everything();
  ++current->step;
}

void plain_access(const void* address, size_t bytes, bool write) {
  check(static_cast<const char*>(address), bytes, write ? Access::kWrite : Access::kRead);
}

void atomic_access(const void* address, size_t bytes) {
  yield();
  check(static_cast<const char*>(address), bytes, Access::kAtomic);
  auto place =
      std::find_if(atomics.begin(), atomics.end(), [=](const auto& a) { return a.first == address; });
  if (place == atomics.end()) place = atomics.insert(place, {address, nullptr});
  current->pending = join(current->pending, place->second);
  place->second = join(place->second, current->released);
}

void reset() {
  if (arena == nullptr) {
    arena = static_cast<char*>(reserve(kArenaBytes));
    arena_shadow = {static_cast<State*>(reserve(kArenaBytes)),
                    static_cast<Cell*>(reserve(kArenaBytes / 2 * sizeof(Cell)))};
  }
  std::fill(arena_shadow.state, arena_shadow.state + arena_used, State::kNobodys);
  arena_used = 0;
  allocations.clear();
}

void* allocate(const char* name, size_t bytes, size_t misalignment, const void* initial) {
  constexpr size_t kGap = 256;
  const size_t begin = arena_used + kGap + misalignment;
  arena_used = (begin + bytes + kGap - 1) / kGap * kGap;
  if (arena_used + kGap > kArenaBytes) throw std::bad_alloc();
  std::fill_n(arena_shadow.state + begin, bytes, initial ? State::kWritten : State::kUnwritten);
  if (initial) {
    std::memcpy(arena + begin, initial, bytes);
  } else {
    std::memset(arena + begin, 0xa5, bytes);  // what was there before is not what anyone expects
  }
  allocations.push_back({name, arena + begin, bytes});
  return arena + begin;
}

bool read(const void* device, void* host, size_t bytes) {
  const size_t begin = static_cast<const char*>(device) - arena;
  std::memcpy(host, device, bytes);
  const State* const state = arena_shadow.state + begin;
  return std::all_of(state, state + bytes, [](State s) { return s == State::kWritten; });
}

std::string launch(const std::function<void()>& to_run, int grid, int block, uint64_t seed,
                   Traffic* counted) {
  if (stacks == nullptr) stacks = static_cast<char*>(reserve(kStackBytes * kResidentBlocks * 1024));
  kernel = &to_run;
  grid_size = grid;
  block_size = block;
  random_engine.seed(static_cast<unsigned>(seed * 2654435761u + 1));
  until_switch = 1 + draw(2 * kAccessesPerSwitch);
  traffic = counted;
  failure.clear();
  accesses = 0;
  atomics.clear();
  // An earlier launch lies in the past of this one.
  std::fill(arena_shadow.cells, arena_shadow.cells + arena_used / 2, Cell{});
  current_block = nullptr;
  resident.clear();
  run_blocks();
  resident.clear();
  return failure;
}

}  // namespace executor

// What `-fsanitize=thread` calls.

using executor::Access;
#define WATCH(bytes)                                                                                   \
  void __tsan_read##bytes(void* p) { executor::check(static_cast<char*>(p), bytes, Access::kRead); }   \
  void __tsan_write##bytes(void* p) { executor::check(static_cast<char*>(p), bytes, Access::kWrite); } \
  void __tsan_unaligned_read##bytes(void* p) {                                                         \
    executor::check(static_cast<char*>(p), bytes, Access::kRead);                                      \
  }                                                                                                    \
  void __tsan_unaligned_write##bytes(void* p) {                                                        \
    executor::check(static_cast<char*>(p), bytes, Access::kWrite);                                     \
  }

extern "C" {
WATCH(1)
WATCH(2)
WATCH(4)
WATCH(8)
WATCH(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
// Objects that are not of one of those sizes, a word at a time: so they are copied too.
void __tsan_read_range(void* p, unsigned long bytes) {
  for (unsigned long i = 0; i < bytes; i += 4) executor::check(static_cast<char*>(p) + i, 4, Access::kRead);
}
void __tsan_write_range(void* p, unsigned long bytes) {
  for (unsigned long i = 0; i < bytes; i += 4) executor::check(static_cast<char*>(p) + i, 4, Access::kWrite);
}
}
