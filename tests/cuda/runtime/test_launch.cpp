#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <random>

#include "check.h"
#include "runtime.h"

/// The launch code, run against the stand-in. Wrong orders end in wrong numbers, forbidden calls are reported
/// by the stand-in itself.

using namespace gradkern;
using namespace gradkern::cuda;

void runtime::report(const std::string& what) { check::fail("runtime", 0, what); }

namespace {

/// Runs a test in a process of its own, for the launch code keeps what it has learnt.
void isolated(void (*body)()) {
  fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    body();
    fflush(nullptr);
    _exit(check::failures() == 0 ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (status != 0) check::fail(__FILE__, __LINE__, "failed, or crashed");
}

#define LAUNCH_TEST(name)               \
  static void name##_body();            \
  TEST(name) { isolated(name##_body); } \
  static void name##_body()

/// Tensors with small integers in them, of which every sum is exact. Old memory is filled with NaN and kept.
struct List {
  explicit List(std::vector<int64_t> numels) : numels(std::move(numels)) { renew(); }

  DType dtype(size_t i) const { return i % 3 == double_at ? DType::kFloat64 : DType::kFloat32; }

  /// New values at new addresses.
  void renew() {
    for (auto& tensor : memory) memset(tensor.data(), 0xff, tensor.size());
    for (auto& tensor : memory) old.push_back(std::move(tensor));
    memory.clear();
    for (size_t i = 0; i < numels.size(); ++i) memory.emplace_back(numels[i] * element_bytes(dtype(i)));
    refill();
  }
  /// New values where they are.
  void refill() {
    for (size_t i = 0; i < numels.size(); ++i) {
      for (int64_t e = 0; e < numels[i]; ++e) set(i, e, static_cast<double>(random() % 9) - 4);
    }
  }
  void set(size_t i, int64_t e, double value) {
    if (dtype(i) == DType::kFloat64) {
      reinterpret_cast<double*>(memory[i].data())[e] = value;
    } else {
      reinterpret_cast<float*>(memory[i].data())[e] = static_cast<float>(value);
    }
  }
  double at(size_t i, int64_t e) const {
    return dtype(i) == DType::kFloat64
               ? reinterpret_cast<const double*>(memory[i].data())[e]
               : static_cast<double>(reinterpret_cast<const float*>(memory[i].data())[e]);
  }
  double sum_sq(size_t i) const {
    double sum = 0;
    for (int64_t e = 0; e < numels[i]; ++e) sum += at(i, e) * at(i, e);
    return sum;
  }
  double sum_sq() const {
    double sum = 0;
    for (size_t i = 0; i < numels.size(); ++i) sum += sum_sq(i);
    return sum;
  }

  Tensors tensors() {
    Tensors all;
    for (size_t i = 0; i < numels.size(); ++i) all.spans.push_back({memory[i].data(), numels[i], dtype(i)});
    return all;
  }

  std::vector<int64_t> numels;
  size_t double_at = 2;  // every third tensor, from this one on, is of float64
  std::vector<std::vector<char>> memory, old;
  std::minstd_rand random{1};
};

std::vector<int64_t> alike(int64_t count, int64_t numel) { return std::vector<int64_t>(count, numel); }

/// One list for each way that addresses travel, and the odd ones: nothing, empty tensors, several chunks.
std::vector<std::vector<int64_t>> shapes() {
  return {{},
          {0},
          {1},
          {0, 5, 0, 17},
          {40000, 3, 16384, 16385},
          alike(kFewAddresses, 2),
          alike(kFewAddresses + 1, 2),
          alike(kManyAddresses, 1),
          alike(kManyAddresses + 1, 1)};
}

std::string describe(const std::vector<int64_t>& numels) {
  return std::to_string(numels.size()) + " tensors, the first of " +
         std::to_string(numels.empty() ? 0 : numels[0]);
}

/// Where a measuring call leaves its results, and what it is to find.
struct Measured {
  explicit Measured(const List& list) : rows(list.numels.size()), sum_sq(list.sum_sq()) {
    for (size_t i = 0; i < rows.size(); ++i) row_sum_sq.push_back(list.sum_sq(i));
  }
  Finish finish() {
    Finish finish;
    finish.rows = rows.data();
    finish.total = &total;
    finish.coef = &coef;
    return finish;
  }
  void check(const std::string& context) const {
    CHECK_EQUAL_IN(context, total.sum_sq, sum_sq);
    for (size_t i = 0; i < rows.size(); ++i) CHECK_EQUAL_IN(context, rows[i].sum_sq, row_sum_sq[i]);
  }

  std::vector<Stats> rows;
  Stats total{-1, -1, -1, -1, -1};
  double coef = -1;
  double sum_sq;
  std::vector<double> row_sum_sq;
};

/// A new place for results. It stays, as what is still queued will write to it.
Measured* results_of(const List& list) {
  static std::vector<std::unique_ptr<Measured>> all;
  all.push_back(std::make_unique<Measured>(list));
  return all.back().get();
}

/// Queues the measuring of a list. The result is there once the stream has run.
const Measured* measure(cudaStream_t stream, List& list) {
  Measured* const measured = results_of(list);
  Launch(runtime::target(stream), list.tensors()).stats(measured->finish());
  return measured;
}

/// Queues measuring and clipping to `max_norm`.
const Measured* clip(cudaStream_t stream, List& list, double max_norm) {
  Measured* const measured = results_of(list);
  Finish finish = measured->finish();
  finish.max_norm = max_norm;
  Launch launch(runtime::target(stream), list.tensors());
  launch.stats(finish);
  launch.apply(&measured->coef, CoefScope::kGlobal, measured->rows.data(), INFINITY, NonFinite::kKeep);
  return measured;
}

template <class Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

LAUNCH_TEST(every_list_is_measured) {
  cudaStream_t stream = runtime::new_stream();
  for (const auto& numels : shapes()) {
    List list(numels);
    for (int call = 0; call < 2; ++call) {
      const auto measured = measure(stream, list);
      runtime::run(stream);
      measured->check(describe(numels));
    }
  }
}

LAUNCH_TEST(fresh_addresses_reach_the_kernel_though_earlier_calls_are_still_queued) {
  cudaStream_t stream = runtime::new_stream();
  for (const auto& numels : shapes()) {
    constexpr int kCalls = 3;
    std::vector<std::unique_ptr<List>> lists;
    std::vector<const Measured*> measured;
    for (int call = 0; call < kCalls; ++call) {
      lists.push_back(std::make_unique<List>(numels));
      lists.back()->random.seed(call + 1);
      lists.back()->refill();
      measured.push_back(measure(stream, *lists.back()));
    }
    runtime::run(stream);
    for (const Measured* one : measured) one->check(describe(numels));
  }
}

LAUNCH_TEST(freed_gradients_are_not_read_again) {
  cudaStream_t stream = runtime::new_stream();
  for (const auto& numels : shapes()) {
    List list(numels);
    for (int call = 0; call < 3; ++call) {
      const auto measured = measure(stream, list);
      runtime::run(stream);
      measured->check(describe(numels));
      list.renew();
    }
  }
}

LAUNCH_TEST(tables_are_copied_only_when_shapes_change) {
  cudaStream_t stream = runtime::new_stream();
  List list({100, 20000}), other({100, 20001});
  for (int call = 0; call < 5; ++call) {
    measure(stream, list);
    list.renew();
    runtime::run(stream);
  }
  CHECK_EQUAL(runtime::count_calls("cudaMemcpyAsync"), 1);
  measure(stream, other);
  CHECK_EQUAL(runtime::count_calls("cudaMemcpyAsync"), 2);
  measure(stream, list);
  CHECK_EQUAL(runtime::count_calls("cudaMemcpyAsync"), 2);
}

LAUNCH_TEST(a_change_of_dtypes_is_a_change_of_shapes) {
  cudaStream_t stream = runtime::new_stream();
  List list({5, 5, 5});
  for (size_t double_at = 0; double_at < 3; ++double_at) {
    list.double_at = double_at;
    list.renew();
    const auto measured = measure(stream, list);
    runtime::run(stream);
    measured->check(std::to_string(double_at));
  }
}

LAUNCH_TEST(a_list_with_known_shapes_takes_one_launch_and_no_other_work) {
  cudaStream_t stream = runtime::new_stream();
  for (const int64_t count : {3, kManyAddresses}) {
    List list(alike(count, 4));
    measure(stream, list);
    runtime::clear_calls();
    measure(stream, list);
    const std::vector<std::string> wanted = {"cudaGetDevice", "cudaStreamGetCaptureInfo", "cudaStreamGetId",
                                             "cudaLaunchKernel"};
    CHECK(runtime::calls() == wanted);
  }
}

LAUNCH_TEST(addresses_that_do_not_fit_are_copied_once_for_all_kernels_of_a_call) {
  cudaStream_t stream = runtime::new_stream();
  List list(alike(kManyAddresses + 1, 1));
  measure(stream, list);
  runtime::clear_calls();
  const double before = list.sum_sq();
  const auto measured = clip(stream, list, std::sqrt(before) / 2);
  CHECK_EQUAL(runtime::count_calls("cudaMemcpyAsync"), 1);
  runtime::run(stream);
  measured->check("");
  CHECK_EQUAL(list.sum_sq(), before / 4);
}

LAUNCH_TEST(a_driver_without_large_arguments_gets_addresses_by_copy) {
  runtime::setting().driver = 12000;
  cudaStream_t stream = runtime::new_stream();
  List list(alike(kFewAddresses + 1, 2));
  measure(stream, list);
  list.renew();
  const auto measured = measure(stream, list);
  CHECK_EQUAL(runtime::count_calls("cudaMemcpyAsync"), 2);
  runtime::run(stream);
  measured->check("");
}

LAUNCH_TEST(clipping_writes_by_the_coefficient_that_measuring_found) {
  cudaStream_t stream = runtime::new_stream();
  List list({3000, 7, 0, 40000});
  const double before = list.sum_sq();
  const auto measured = clip(stream, list, std::sqrt(before) / 2);
  runtime::run(stream);
  CHECK_EQUAL(measured->coef, 0.5);
  CHECK_EQUAL(list.sum_sq(), before / 4);
}

LAUNCH_TEST(every_kernel_gets_what_it_needs) {
  cudaStream_t stream = runtime::new_stream();
  for (const auto& numels : shapes()) {
    if (numels.empty()) continue;
    List list(numels), weights(numels);
    const size_t count = numels.size();
    const std::string context = describe(numels);

    // Units: the first tensor as one, the others an element each.
    Tensors by_units = list.tensors();
    by_units.units.emplace();
    int64_t unit_count = 0;
    for (size_t i = 0; i < count; ++i) {
      const int64_t units = i == 0 ? 1 : numels[i];
      by_units.units->push_back({units, units > 0 ? numels[i] / units : 0, unit_count});
      unit_count += units;
    }
    std::vector<double> sums(unit_count, 0.0), coefs(unit_count, 2.0);
    {
      Launch launch(runtime::target(stream), by_units);
      launch.unit_sums(sums.data());
      launch.apply(coefs.data(), CoefScope::kUnit, nullptr, INFINITY, NonFinite::kKeep);
    }
    const double before = list.sum_sq(), first = list.sum_sq(0);
    runtime::run(stream);
    double sum = 0;
    for (const double unit : sums) sum += unit;
    CHECK_EQUAL_IN(context, sum, before);
    CHECK_EQUAL_IN(context, sums[0], first);
    CHECK_EQUAL_IN(context, list.sum_sq(), 4 * before);

    std::vector<double> tensor_coefs(count, 0.5);
    Launch(runtime::target(stream), list.tensors())
        .apply(tensor_coefs.data(), CoefScope::kTensor, nullptr, INFINITY, NonFinite::kKeep);
    runtime::run(stream);
    CHECK_EQUAL_IN(context, list.sum_sq(), before);

    Measured clipped(list);
    Launch(runtime::target(stream), list.tensors()).value(clipped.finish(), 1);
    runtime::run(stream);
    clipped.check(context);
    CHECK_EQUAL_IN(
        context, list.sum_sq(), before == 0 ? 0.0 : [&] {
          double ones = 0;
          for (size_t i = 0; i < count; ++i) {
            for (int64_t e = 0; e < numels[i]; ++e) ones += list.at(i, e) != 0;
          }
          return ones;
        }());

    std::vector<int64_t> counts(count * kExponentColumns, 0);
    Launch(runtime::target(stream), list.tensors()).exponents(counts.data());
    runtime::run(stream);
    for (size_t i = 0; i < count; ++i) {
      const int64_t* const row = counts.data() + i * kExponentColumns;
      const int64_t ones = row[kFirstExponentColumn - kFirstExponent];  // they are -1, 0 and 1 now
      CHECK_EQUAL_IN(context, row[kZeroColumn] + ones, numels[i]);
      CHECK_EQUAL_IN(context, static_cast<double>(ones), list.sum_sq(i));
    }

    Tensors pairs = list.tensors();
    for (const Span& span : weights.tensors().spans) pairs.weights.push_back(span.data);
    std::vector<double> values(count, -1.0);
    Launch(runtime::target(stream), pairs).penalty(0, 0.5, values.data());
    List expected = list;
    for (size_t i = 0; i < count; ++i) {
      for (int64_t e = 0; e < numels[i]; ++e) expected.set(i, e, list.at(i, e) + weights.at(i, e));
    }
    runtime::run(stream);
    CHECK_EQUAL_IN(context, list.sum_sq(), expected.sum_sq());
    for (size_t i = 0; i < count; ++i) CHECK_EQUAL_IN(context, values[i], 0.5 * weights.sum_sq(i));
  }
}

LAUNCH_TEST(two_streams_share_nothing) {
  cudaStream_t one = runtime::new_stream(), two = runtime::new_stream();
  for (const auto& numels : shapes()) {
    List list(numels), other(numels);
    for (int call = 0; call < 3; ++call) {
      const auto first = measure(one, list), second = measure(two, other);
      runtime::run_together({one, two});
      first->check(describe(numels));
      second->check(describe(numels));
    }
  }
}

LAUNCH_TEST(two_devices_serve_in_one_process) {
  cudaStream_t here = runtime::new_stream(0), there = runtime::new_stream(1);
  for (const auto& numels : shapes()) {
    List list(numels), other(numels);
    for (int call = 0; call < 2; ++call) {
      const auto first = measure(here, list), second = measure(there, other);
      int device = -1;
      cudaGetDevice(&device);
      CHECK_EQUAL(device, 0);
      runtime::run_together({here, there});
      first->check(describe(numels));
      second->check(describe(numels));
    }
  }
}

LAUNCH_TEST(pinned_memory_is_written_again_only_after_its_copy) {
  cudaStream_t stream = runtime::new_stream();
  List list(alike(kManyAddresses + 1, 1));
  for (int call = 0; call < 4; ++call) measure(stream, list);
  CHECK_EQUAL(runtime::count_calls("cudaHostAlloc"), 4);
  runtime::run(stream);
  for (int call = 0; call < 4; ++call) measure(stream, list);
  CHECK_EQUAL(runtime::count_calls("cudaHostAlloc"), 4);
}

LAUNCH_TEST(memory_that_is_kept_is_bounded) {
  cudaStream_t stream = runtime::new_stream(), other = runtime::new_stream();
  constexpr int64_t kAllowed = int64_t{64} << 20, kLarge = int64_t{1} << 40;
  runtime::setting().device_bytes = kLarge;
  for (int64_t extra = 0; extra < 40; ++extra) {
    List list(alike(30000 + extra, 1));
    const auto measured = measure(stream, list);
    runtime::run(stream);
    measured->check(std::to_string(extra));
  }
  CHECK(kLarge - runtime::setting().device_bytes <= kAllowed);
  List list({10});
  const auto measured = measure(other, list);  // nothing is left for another stream but to borrow
  CHECK(runtime::count_calls("allocate") >= 1);
  runtime::run(other);
  measured->check("");
}

LAUNCH_TEST(memory_is_not_taken_over_from_another_stream) {
  cudaStream_t one = runtime::new_stream(), two = runtime::new_stream();
  std::vector<std::unique_ptr<List>> lists;
  std::vector<const Measured*> measured;
  for (int64_t extra = 0; extra < 17; ++extra) {  // one more than is kept, and none has run
    lists.push_back(std::make_unique<List>(alike(30000 + extra, 1)));
    measured.push_back(measure(extra < 16 ? one : two, *lists.back()));
  }
  runtime::run_together({two, one});
  for (const Measured* call : measured) call->check("");
}

LAUNCH_TEST(a_full_device_is_served_by_borrowing) {
  runtime::setting().device_bytes = 0;
  cudaStream_t one = runtime::new_stream(), two = runtime::new_stream();
  for (const auto& numels : shapes()) {
    List list(numels), other(numels);
    for (int call = 0; call < 2; ++call) {
      const auto first = measure(one, list), second = measure(two, other), third = measure(one, list);
      runtime::run_together({one, two});
      first->check(describe(numels));
      second->check(describe(numels));
      third->check(describe(numels));
    }
  }
}

LAUNCH_TEST(out_of_memory_says_how_many_bytes_for_what) {
  runtime::setting().device_bytes = 0;
  runtime::lendable() = 0;
  cudaStream_t stream = runtime::new_stream();
  List list({100000, 3});
  const std::string message = error_of([&] { measure(stream, list); });
  CHECK(contains(message, "out of memory on cuda:0"));
  CHECK(contains(message, " bytes for the launch tables and partial sums of 2 tensors in 8 chunks"));
  CHECK_EQUAL(runtime::count_calls("cudaMemcpyAsync"), 0);
}

LAUNCH_TEST(more_elements_than_32_bits_can_count_are_planned) {
  cudaStream_t stream = runtime::new_stream();
  constexpr int64_t kNumel = (int64_t{5} << 30) + 11;
  Tensors tensors;
  tensors.spans.push_back({nullptr, kNumel, DType::kBFloat16});
  Stats row, total;
  Finish finish;
  finish.rows = &row;
  finish.total = &total;
  Launch(runtime::target(stream), tensors).stats(finish);
  runtime::step(stream);  // the copy, not the kernel
  const Plan plan = runtime::last_plan();
  CHECK_EQUAL(int64_t{plan.chunk_count}, chunk_count(kNumel));
  const Chunk& last = plan.chunks[plan.chunk_count - 1];
  CHECK_EQUAL(last.offset + last.length, kNumel);
}

/// PyTorch's documented recipe: gradients are allocated while the graph is captured.
LAUNCH_TEST(the_whole_network_recipe_replays_with_eager_calls_in_between) {
  for (const auto& numels : shapes()) {
    for (const bool warm : {false, true}) {
      const std::string context = describe(numels) + (warm ? ", after a warm-up" : "");
      cudaStream_t stream = runtime::new_stream(), side = runtime::new_stream();
      List warm_up(numels), other({70000, 5}), many(alike(kManyAddresses + 1, 1));
      if (warm) {
        measure(side, warm_up);
        measure(stream, warm_up);
        runtime::run_together({side, stream});
      }
      runtime::begin_capture(stream);
      List list(numels);
      const auto measured = clip(stream, list, INFINITY);
      const auto again = clip(stream, list, INFINITY);
      CHECK(!runtime::capture_failed(stream));
      cudaGraph_t const graph = runtime::end_capture(stream);

      for (int replay = 0; replay < 5; ++replay) {
        list.refill();
        const Measured wanted(list);
        runtime::replay(graph, stream);
        const auto eager = measure(side, other), eager_many = measure(stream, many);
        const auto same_shapes = measure(side, warm_up);
        runtime::run_together({stream, side});
        eager->check(context);
        eager_many->check(context);
        same_shapes->check(context);
        CHECK_EQUAL_IN(context, measured->total.sum_sq, wanted.sum_sq);
        CHECK_EQUAL_IN(context, again->total.sum_sq, wanted.sum_sq);
      }
      runtime::destroy(graph);
    }
  }
}

LAUNCH_TEST(two_graphs_replay_at_the_same_time) {
  cudaStream_t one = runtime::new_stream(), two = runtime::new_stream();
  List list(alike(kManyAddresses + 1, 1)), other({50000, 3});
  runtime::begin_capture(one);
  const auto first = measure(one, list);
  cudaGraph_t const graph = runtime::end_capture(one);
  runtime::begin_capture(two);
  const auto second = measure(two, other);
  cudaGraph_t const other_graph = runtime::end_capture(two);
  for (int replay = 0; replay < 3; ++replay) {
    runtime::replay(graph, one);
    runtime::replay(other_graph, two);
    runtime::run_together({one, two});
    first->check("");
    second->check("");
  }
}

LAUNCH_TEST(a_captured_call_is_one_copy_and_its_kernels) {
  cudaStream_t stream = runtime::new_stream();
  List list({100, 20000});
  runtime::begin_capture(stream);
  clip(stream, list, 1);
  cudaGraph_t const graph = runtime::end_capture(stream);
  const std::vector<std::string> wanted = {"cudaMemcpyAsync", "stats_kernel", "apply_kernel"};
  CHECK(runtime::nodes(graph) == wanted);
}

LAUNCH_TEST(pinned_memory_of_a_graph_is_free_again_when_the_graph_is_gone) {
  cudaStream_t stream = runtime::new_stream();
  List list({100});
  for (int capture = 0; capture < 3; ++capture) {
    runtime::begin_capture(stream);
    measure(stream, list);
    runtime::destroy(runtime::end_capture(stream));
  }
  CHECK_EQUAL(runtime::count_calls("cudaHostAlloc"), 1);
}

LAUNCH_TEST(an_eager_call_does_not_end_the_capture_of_another_thread) {
  cudaStream_t captured = runtime::new_stream(), stream = runtime::new_stream();
  runtime::begin_capture(captured);
  for (const auto& numels : shapes()) {
    List list(numels);
    const auto measured = measure(stream, list);
    runtime::run(stream);
    measured->check(describe(numels));
  }
  CHECK(!runtime::capture_failed(captured));
}

LAUNCH_TEST(nothing_is_added_to_a_capture_that_has_failed) {
  cudaStream_t stream = runtime::new_stream();
  List list({100});
  measure(stream, list);
  runtime::run(stream);
  runtime::begin_capture(stream);
  runtime::invalidate(stream);
  CHECK(contains(error_of([&] { measure(stream, list); }), "capture of this stream has already failed"));
  CHECK(runtime::nodes(runtime::end_capture(stream)).empty());
}

LAUNCH_TEST(a_failed_launch_names_its_kernel) {
  cudaStream_t stream = runtime::new_stream();
  List list({100});
  measure(stream, list);
  runtime::clear_calls();
  runtime::setting().fail_call = 3;
  const std::string message = error_of([&] { measure(stream, list); });
  CHECK(contains(message, "launching stats_kernel failed"));
  CHECK(contains(message, "cudaErrorLaunchFailure"));
}

/// Lets each call to the runtime that `work` makes fail in turn, in a process of its own. The failure must be
/// reported, and `work` must be right the next time.
void fail_every_call(const std::string& context, const std::function<void()>& prepare,
                     const std::function<void()>& work) {
  constexpr int kNoneLeft = 2;
  for (const cudaError_t with : {cudaErrorLaunchFailure, cudaErrorMemoryAllocation}) {
    int status = 0;
    int failing = 0;
    for (; status == 0; ++failing) {
      fflush(nullptr);
      const pid_t child = fork();
      if (child == 0) {
        prepare();
        runtime::clear_calls();
        runtime::setting().fail_call = failing;
        runtime::setting().fail_with = with;
        const std::string message = error_of(work);
        runtime::setting().fail_call = -1;
        if (runtime::calls().size() <= static_cast<size_t>(failing)) _exit(kNoneLeft);
        const std::string failed = runtime::calls()[static_cast<size_t>(failing)];
        // Putting things back cannot be reported; and there is another way than to keep memory.
        const bool may_pass = failed == "cudaThreadExchangeStreamCaptureMode" || failed == "cudaSetDevice" ||
                              (failed == "cudaMalloc" && with == cudaErrorMemoryAllocation);
        if (!may_pass) CHECK_EQUAL_IN(context + ": " + failed, message.substr(0, 10), "gradkern: ");
        work();
        fflush(nullptr);
        _exit(check::failures() == 0 ? 0 : 1);
      }
      waitpid(child, &status, 0);
    }
    const bool all_failed = WIFEXITED(status) && WEXITSTATUS(status) == kNoneLeft;
    if (!all_failed)
      check::fail(__FILE__, __LINE__, context + ": call " + std::to_string(failing - 1) + " failing");
    CHECK(failing > 4);
  }
}

LAUNCH_TEST(a_failure_at_any_call_is_reported_and_forgotten) {
  for (const int64_t count : {2, kManyAddresses + 1}) {
    cudaStream_t stream = runtime::new_stream(1);
    List list(alike(count, 2));
    const std::string context = describe(list.numels);
    const auto eager = [&] {
      const auto measured = clip(stream, list, INFINITY);
      runtime::run(stream);
      measured->check(context);
    };
    const auto captured = [&] {
      runtime::begin_capture(stream);
      const Measured* measured = nullptr;
      try {
        measured = clip(stream, list, INFINITY);
      } catch (...) {
        runtime::end_capture(stream);
        throw;
      }
      cudaGraph_t const graph = runtime::end_capture(stream);
      runtime::replay(graph, stream);
      runtime::run(stream);
      measured->check(context);
      runtime::destroy(graph);
    };
    const auto nothing = [] {};
    const auto queued = [&] { measure(stream, list); };
    const auto full = [] { runtime::setting().device_bytes = 0; };
    fail_every_call(context + ", the first call", nothing, eager);
    fail_every_call(context + ", known shapes", queued, eager);
    fail_every_call(context + ", borrowing", full, eager);
    fail_every_call(context + ", captured", nothing, captured);
    fail_every_call(context + ", captured after a call", queued, captured);
  }
}

LAUNCH_TEST(an_unusable_device_is_explained) {
  runtime::setting().count = cudaErrorInsufficientDriver;
  runtime::setting().driver = 12040;
  std::string message = problem(0);
  CHECK(contains(message, "built with CUDA 13.0"));
  CHECK(contains(message, "it serves CUDA 12.4"));
  CHECK(contains(message, "Update the driver"));

  runtime::setting().driver = 0;
  CHECK(contains(problem(0), "no NVIDIA driver is installed"));

  runtime::setting().count = cudaErrorNoDevice;
  CHECK(contains(problem(0), "no CUDA device is visible"));
  CHECK(contains(problem(0), "CUDA_VISIBLE_DEVICES"));

  runtime::setting() = {};
  CHECK(contains(problem(7), "there is no cuda:7: CUDA sees 2 devices"));

  runtime::setting().load = cudaErrorNoKernelImageForDevice;
  message = problem(1);
  CHECK(contains(message, "cuda:1 is of architecture sm_90"));
  CHECK(contains(message, "built for sm_75, sm_80"));
  CHECK(contains(message, "GRADKERN_CUDA_ARCHS=90"));
  cudaStream_t stream = runtime::new_stream(1);
  List list({3});
  CHECK(contains(error_of([&] { measure(stream, list); }), "GRADKERN_CUDA_ARCHS=90"));

  runtime::setting() = {};
  CHECK_EQUAL(problem(1), "");  // a device may become usable
  measure(stream, list);
}

}  // namespace
