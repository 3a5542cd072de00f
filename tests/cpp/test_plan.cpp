#include "core/plan.h"

#include "check.h"
#include "data.h"

using namespace gradkern;

namespace {

TEST(chunks_cover_a_tensor_once_in_order) {
  for (const int64_t chunk_numel : {int64_t{1}, int64_t{7}, int64_t{16}, kChunkNumel}) {
    for (const int64_t chunks_wanted : {0, 1, 2, 5}) {
      for (const int64_t extra : {-1, 0, 1}) {
        const int64_t numel = chunks_wanted * chunk_numel + extra;
        if (numel < 0) continue;
        std::vector<Chunk> chunks(chunk_count(numel, chunk_numel));
        CHECK(plan(3, numel, chunks.data(), chunk_numel) == chunks.data() + chunks.size());
        int64_t next = 0;
        for (const Chunk& chunk : chunks) {
          CHECK_EQUAL(chunk.tensor, 3);
          CHECK_EQUAL(chunk.offset, next);
          CHECK(chunk.length >= 1 && chunk.length <= chunk_numel);
          CHECK(chunk.length == chunk_numel || &chunk == &chunks.back());
          next += chunk.length;
        }
        CHECK_EQUAL(next, numel);
      }
    }
  }
}

TEST(an_empty_tensor_has_no_chunk) {
  CHECK_EQUAL(chunk_count(0), 0);
  Chunk none;
  CHECK(plan(0, 0, &none) == &none);
}

TEST(offsets_do_not_end_at_32_bits) {
  const int64_t numel = (int64_t{1} << 40) + 17, chunk_numel = int64_t{1} << 30;
  std::vector<Chunk> chunks(chunk_count(numel, chunk_numel));
  CHECK_EQUAL(chunks.size(), size_t{1025});
  plan(0, numel, chunks.data(), chunk_numel);
  CHECK_EQUAL(chunks.back().offset, int64_t{1} << 40);
  CHECK_EQUAL(chunks.back().length, 17);
}

TEST(chunk_counts_do_not_overflow_at_the_largest_size) {
  const int64_t most = std::numeric_limits<int64_t>::max();
  CHECK_EQUAL(chunk_count(most), (int64_t{1} << 47));
  CHECK_EQUAL(chunk_count(most, 1), most);
}

TEST(fold_of_nothing_is_the_identity) { CHECK(data::same_bits(fold<Stats>(nullptr, 0), Stats{})); }

TEST(fold_merges_every_part_once) {
  std::vector<Stats> parts;
  double sum = 0;
  for (int count = 1; count < 70; ++count) {
    parts.push_back({1.0 * count, 1.0 * ((count * 37) % 64), 1, 2, 3});
    sum += count;
    const Stats total = fold(parts.data(), count);
    CHECK_EQUAL(total.sum_sq, sum);
    CHECK_EQUAL(total.nan_count, 1.0 * count);
    CHECK_EQUAL(total.inf_count, 2.0 * count);
    CHECK_EQUAL(total.zero_count, 3.0 * count);
    double largest = 0;
    for (const Stats& part : parts) largest = std::max(largest, part.abs_max);
    CHECK_EQUAL(total.abs_max, largest);
  }
}

TEST(fold_goes_pairwise_neighbours_first) {
  data::Random random(3);
  std::vector<Stats> parts(8);
  for (Stats& part : parts) part.sum_sq = random.uniform();
  const auto s = [&](int i) { return parts[i].sum_sq; };
  CHECK_EQUAL(fold(parts.data(), 8).sum_sq,
              ((s(0) + s(1)) + (s(2) + s(3))) + ((s(4) + s(5)) + (s(6) + s(7))));
  // What is left beyond a power of two joins from the right.
  CHECK_EQUAL(fold(parts.data(), 7).sum_sq, ((s(0) + s(1)) + (s(2) + s(3))) + ((s(4) + s(5)) + s(6)));
}

TEST(fold_of_a_million_equal_parts_is_exact_to_a_few_bits) {
  const std::vector<Stats> parts(1 << 20, Stats{0.1, 0.1, 0, 0, 0});
  CHECK_EQUAL(fold(parts.data(), static_cast<int64_t>(parts.size())).sum_sq, 0.1 * (1 << 20));
}

TEST(a_folder_gives_at_any_time_what_fold_gives) {
  data::Random random(5);
  std::vector<Stats> parts;
  Folder<Stats> folder;
  for (int count = 1; count < 40; ++count) {
    parts.push_back({random.uniform(), random.uniform(), 1, 0, 0});
    folder.add(parts.back());
    CHECK(data::same_bits(folder.total(), fold(parts.data(), count)));
  }
}

TEST(ranges_of_units_hold_about_a_chunk) {
  Units units;
  for (const int64_t numel : {int64_t{1}, int64_t{100}, kChunkNumel - 1, kChunkNumel}) {
    units.numel = numel;
    CHECK_EQUAL(units_per_range(units), kChunkNumel / numel);
  }
  units.numel = kChunkNumel + 1;
  CHECK_EQUAL(units_per_range(units), 1);
}

TEST(empty_units_still_come_one_to_a_range) { CHECK_EQUAL(units_per_range(Units{}), 1); }

}  // namespace
