#include <thread>

#include "check.h"
#include "cpu/kernels.h"
#include "data.h"

using namespace gradkern;
using data::Gradient;

/// The threads are the caller's: these are the tests that ThreadSanitizer runs, on std::thread because it
/// reports races inside OpenMP's runtime that are none.

namespace {

/// A model's gradients: all dtypes, from empty to several chunks, with the chunk table of all of them.
struct Model {
  std::vector<Gradient> gradients;
  std::vector<Chunk> chunks;

  Model() {
    int32_t tensor = 0;
    for (const int64_t numel : {int64_t{0}, int64_t{1}, int64_t{1000}, kChunkNumel, 3 * kChunkNumel + 77}) {
      for (const DType dtype : data::kDTypes) {
        gradients.push_back(data::mixed(dtype, numel, 0, 100 + tensor));
        const size_t first = chunks.size();
        chunks.resize(first + chunk_count(numel));
        plan(tensor++, numel, chunks.data() + first);
      }
    }
  }

  std::vector<Span> spans() {
    std::vector<Span> all;
    for (Gradient& gradient : gradients) all.push_back(gradient.span());
    return all;
  }
};

/// Calls `work(first chunk, chunks)` on each of `count` threads, which share the chunks evenly.
template <class Work>
void on_threads(int count, size_t chunks, const Work& work) {
  std::vector<std::thread> threads;
  for (int t = 0; t < count; ++t) {
    const size_t begin = chunks * t / count, end = chunks * (t + 1) / count;
    threads.emplace_back([=] { work(begin, static_cast<int64_t>(end - begin)); });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(any_number_of_threads_measures_the_same_bits) {
  Model model;
  const std::vector<Span> spans = model.spans();
  std::vector<Stats> expected(model.chunks.size());
  cpu::kernels().measure(spans.data(), model.chunks.data(), static_cast<int64_t>(expected.size()),
                         expected.data());
  for (const int count : {1, 2, 3, 8}) {
    std::vector<Stats> partials(model.chunks.size());
    on_threads(count, partials.size(), [&](size_t begin, int64_t chunks) {
      cpu::kernels().measure(spans.data(), &model.chunks[begin], chunks, &partials[begin]);
    });
    for (size_t i = 0; i < partials.size(); ++i) CHECK(data::same_bits(partials[i], expected[i]));
  }
}

TEST(any_number_of_threads_writes_the_same_bits) {
  Model alone;
  const std::vector<Action> actions(alone.gradients.size(), Action{0.3, 0.5, NonFinite::kZero});
  const std::vector<Span> spans = alone.spans();
  cpu::kernels().apply(spans.data(), alone.chunks.data(), static_cast<int64_t>(alone.chunks.size()),
                       actions.data());
  for (const int count : {2, 3, 8}) {
    Model shared;
    const std::vector<Span> shared_spans = shared.spans();
    on_threads(count, shared.chunks.size(), [&](size_t begin, int64_t chunks) {
      cpu::kernels().apply(shared_spans.data(), &shared.chunks[begin], chunks, actions.data());
    });
    for (size_t i = 0; i < alone.gradients.size(); ++i) {
      CHECK(shared.gradients[i].same_bits(alone.gradients[i]));
    }
  }
}

TEST(any_number_of_threads_clamps_the_same_bits) {
  Model alone;
  std::vector<Action> actions(alone.gradients.size());
  for (size_t i = 0; i < actions.size(); ++i) actions[i].bound = round_to(alone.gradients[i].dtype(), 0.1);
  const std::vector<Span> spans = alone.spans();
  std::vector<Stats> expected(alone.chunks.size());
  cpu::kernels().clamp(spans.data(), alone.chunks.data(), static_cast<int64_t>(expected.size()),
                       actions.data(), expected.data());
  for (const int count : {2, 3, 8}) {
    Model shared;
    const std::vector<Span> shared_spans = shared.spans();
    std::vector<Stats> partials(shared.chunks.size());
    on_threads(count, shared.chunks.size(), [&](size_t begin, int64_t chunks) {
      cpu::kernels().clamp(shared_spans.data(), &shared.chunks[begin], chunks, actions.data(),
                           &partials[begin]);
    });
    for (size_t i = 0; i < partials.size(); ++i) CHECK(data::same_bits(partials[i], expected[i]));
    for (size_t i = 0; i < alone.gradients.size(); ++i) {
      CHECK(shared.gradients[i].same_bits(alone.gradients[i]));
    }
  }
}

}  // namespace
