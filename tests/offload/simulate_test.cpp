#include "ferry/offload/simulate.h"

#include <gtest/gtest.h>

#include <random>

#include "ferry/base/error.h"
#include "ferry/offload/arena.h"

namespace ferry::offload {
namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr double kRate = 100.0 * kMiB;  // a group of 10 MiB takes 0.1 s

std::vector<GroupCost> equal_groups(size_t count, double compute_s) {
  std::vector<GroupCost> groups;
  for (size_t i = 0; i < count; ++i) {
    GroupCost group{"g" + std::to_string(i), 10 * kMiB, 10 * kMiB};
    group.compute_s = compute_s;
    group.pack_bytes = 5 * kMiB;
    groups.push_back(group);
  }
  return groups;
}

Schedule streamed(size_t count, uint64_t arena_groups, Home home = Home::disk) {
  Schedule schedule;
  schedule.placements.assign(count, Placement::streamed);
  schedule.homes.assign(count, home);
  schedule.arena_bytes = arena_groups * 10 * kMiB;
  schedule.piece_bytes = 2 * kMiB;
  schedule.staging_bytes = 8 * kMiB;
  return schedule;
}

Prediction predict(const std::vector<GroupCost>& groups, const Rates& rates,
                   const Schedule& schedule) {
  PlanOptions options;
  options.rates = rates;
  return Simulator(groups, options).run(schedule).prediction;
}

// Where the arithmetic can be done by hand. Eight groups; a read of one takes 0.1 s.
TEST(Simulate, DiskAgainstComputeInClosedForm) {
  const Rates disk{.disk_bytes_per_s = kRate};
  struct Row {
    double compute_s;
    uint64_t arena_groups;
    double step_s, first_s;
    Bound bound;
  };
  const Row rows[] = {
      {0.05, 1, 8 * 0.15, 8 * 0.15, Bound::room},        // nothing overlaps
      {0.05, 2, 8 * 0.1, 8 * 0.1 + 0.05, Bound::disk},   // compute hides
      {0.3, 2, 8 * 0.3, 0.1 + 8 * 0.3, Bound::compute},  // reads hide
      {0.05, 4, 8 * 0.1, 8 * 0.1 + 0.05, Bound::disk},   // more room changes nothing
  };
  for (const Row& row : rows) {
    auto groups = equal_groups(8, row.compute_s);
    Prediction result = predict(groups, disk, streamed(8, row.arena_groups));
    EXPECT_NEAR(result.step_s, row.step_s, 1e-9) << row.compute_s << " " << row.arena_groups;
    EXPECT_NEAR(result.first_step_s, row.first_s, 1e-9) << row.compute_s << " " << row.arena_groups;
    EXPECT_EQ(result.bound, row.bound) << bound_name(result.bound);
    EXPECT_NEAR(result.compute_s, 8 * row.compute_s, 1e-9);
    EXPECT_NEAR(result.disk_s, 0.8, 1e-9);
    EXPECT_EQ(result.disk_bytes, 80 * kMiB);
    EXPECT_EQ(result.link_bytes, 0u);
  }
}

// Two groups take 0.13 s each to read, the next two 0.07 s.
TEST(Simulate, AnUnevenDiskNeedsRoomToReadAhead) {
  const Rates uneven{.disk_bytes_per_s = kRate, .disk_unevenness = 0.3};
  struct Row {
    double compute_s;
    uint64_t arena_groups;
    double step_s;
  };
  const Row rows[] = {
      {0.02, 2, 8 * 0.40},                         // the disk is as fast as ever
      {0.11, 2, 8 * (0.13 + 0.13 + 0.11 + 0.11)},  // what is slow is waited for
      {0.11, 4, 32 * 0.11},                        // or was read before
  };
  for (const Row& row : rows) {
    auto groups = equal_groups(32, row.compute_s);
    Prediction result = predict(groups, uneven, streamed(32, row.arena_groups));
    EXPECT_NEAR(result.step_s, row.step_s, 1e-9) << row.compute_s << " " << row.arena_groups;
    EXPECT_NEAR(result.disk_s, 3.2, 1e-9);
  }
}

TEST(Simulate, AnArenaThatHoldsAllKeepsAll) {
  Prediction result = predict(equal_groups(8, 0.05), {.disk_bytes_per_s = kRate}, streamed(8, 8));
  EXPECT_NEAR(result.step_s, 8 * 0.05, 1e-9);
  EXPECT_EQ(result.disk_bytes, 0u);
}

TEST(Simulate, ResidentsAreReadOnce) {
  Schedule schedule = streamed(8, 2);
  schedule.placements.assign(8, Placement::resident);
  Prediction result = predict(equal_groups(8, 0.05), {.disk_bytes_per_s = kRate}, schedule);
  EXPECT_NEAR(result.step_s, 8 * 0.05, 1e-9);
  EXPECT_NEAR(result.first_step_s, 8 * 0.1 + 0.05, 1e-9);
  EXPECT_EQ(result.disk_bytes, 0u);
}

TEST(Simulate, LinkAndDiskAreTwoResources) {
  const Rates rates{.disk_bytes_per_s = kRate, .link_bytes_per_s = 2 * kRate};
  auto groups = equal_groups(8, 0.01);
  // From host memory: only the link, 0.05 s a group; the first time they come from disk.
  Prediction host = predict(groups, rates, streamed(8, 3, Home::host));
  EXPECT_NEAR(host.step_s, 8 * 0.05, 1e-9);
  EXPECT_EQ(host.bound, Bound::link);
  EXPECT_EQ(host.disk_bytes, 0u);
  EXPECT_EQ(host.link_bytes, 80 * kMiB);
  EXPECT_GT(host.first_step_s, 8 * 0.1);
  // From disk: the copies of five pieces hide behind the reads, but for the last.
  Prediction disk = predict(groups, rates, streamed(8, 3));
  EXPECT_NEAR(disk.step_s, 8 * 0.1, 1e-9);
  EXPECT_EQ(disk.bound, Bound::disk);
  EXPECT_NEAR(disk.link_s, 8 * 0.05, 1e-9);
  EXPECT_NEAR(predict(groups, rates, streamed(8, 1)).step_s, 8 * (0.1 + 0.05 / 5 + 0.01), 1e-9);
}

TEST(Simulate, StagingOfOnePieceMakesReadsWaitForCopies) {
  const Rates rates{.disk_bytes_per_s = kRate, .link_bytes_per_s = kRate};
  Schedule schedule = streamed(8, 3);
  EXPECT_NEAR(predict(equal_groups(8, 0.01), rates, schedule).step_s, 8 * 0.1, 1e-9);
  schedule.staging_bytes = schedule.piece_bytes;
  EXPECT_NEAR(predict(equal_groups(8, 0.01), rates, schedule).step_s, 8 * 0.2, 1e-9);
}

TEST(Simulate, PacksReadLessAndAreDecodedPieceByPiece) {
  Rates rates{.disk_bytes_per_s = kRate, .decode_bytes_per_s = 4 * kRate};
  auto groups = equal_groups(8, 0.01);
  Prediction pack = predict(groups, rates, streamed(8, 2, Home::pack));
  EXPECT_NEAR(pack.step_s, 8 * 0.05, 1e-9);  // half the bytes; decoding takes 0.025 s
  EXPECT_NEAR(pack.decode_s, 8 * 0.025, 1e-9);
  EXPECT_EQ(pack.disk_bytes, 40 * kMiB);
  rates.decode_bytes_per_s = kRate;
  Prediction slow = predict(groups, rates, streamed(8, 2, Home::pack));
  EXPECT_NEAR(slow.step_s, 8 * 0.1, 0.02);
  EXPECT_EQ(slow.bound, Bound::decode);
}

TEST(Simulate, ReadingSlowsComputeDownWhileTheyOverlap) {
  const Rates rates{.disk_bytes_per_s = kRate, .read_slowdown = 0.5};
  // Two thirds of the time a read is running: 0.1 s of reading hides 0.1 / 1.5 of compute.
  auto groups = equal_groups(8, 0.2);
  EXPECT_NEAR(predict(groups, rates, streamed(8, 2)).step_s, 8 * (0.2 + 0.1 * (1 - 1 / 1.5)), 1e-9);
  EXPECT_NEAR(predict(groups, rates, streamed(8, 1)).step_s, 8 * 0.3, 1e-9);  // never together
}

TEST(Simulate, LatencyCountsForEachGroup) {
  EXPECT_NEAR(predict(equal_groups(8, 0.01), {.disk_bytes_per_s = kRate, .disk_latency_s = 0.02},
                      streamed(8, 2))
                  .step_s,
              8 * 0.12, 1e-9);
}

TEST(Simulate, AStepThatDoesNotWrapWaitsForItsFirstGroup) {
  auto groups = equal_groups(8, 0.05);
  PlanOptions options;
  options.rates.disk_bytes_per_s = kRate;
  options.wrap_around = false;
  EXPECT_NEAR(Simulator(groups, options).run(streamed(8, 2)).prediction.step_s, 8 * 0.1 + 0.05,
              1e-9);
}

TEST(Simulate, AGroupThatIsUsedTwiceMayStayBetween) {
  auto groups = equal_groups(2, 0.5);
  PlanOptions options;
  options.rates.disk_bytes_per_s = kRate;
  options.order = {0, 0, 1};
  Simulation result = Simulator(groups, options).run(streamed(2, 1));
  EXPECT_NEAR(result.prediction.step_s, 1.7, 1e-9);
  EXPECT_EQ(result.prediction.disk_bytes, 20 * kMiB);  // not read again for the second use
  EXPECT_EQ(result.stall_s.size(), 3u);
  options.order = {0, 7};
  EXPECT_THROW(Simulator(groups, options), ArgumentError);
}

TEST(Simulate, SpansLieWithinTheStepAndNeverOverlapOnAResource) {
  auto groups = equal_groups(6, 0.07);
  PlanOptions options;
  options.rates = {.disk_bytes_per_s = kRate, .link_bytes_per_s = 3 * kRate};
  Simulation result = Simulator(groups, options)
                          .run(streamed(6, 3), {.cold = true, .steady_steps = 3, .record = true});
  double busy[4] = {};
  std::vector<Span> last(4);
  for (const Span& span : result.spans) {
    const int resource = static_cast<int>(span.resource);
    EXPECT_GE(span.begin_s, 0);
    EXPECT_LE(span.end_s, result.prediction.step_s + 1e-9);
    EXPECT_GE(span.begin_s, last[resource].end_s - 1e-9);
    busy[resource] += span.end_s - span.begin_s;
    last[resource] = span;
  }
  EXPECT_NEAR(busy[0], result.prediction.compute_s, 1e-6);
  EXPECT_NEAR(busy[1], result.prediction.disk_s, 1e-6);
  EXPECT_NEAR(busy[2], result.prediction.link_s, 1e-6);
  EXPECT_FALSE(result.first_spans.empty());
}

TEST(ArenaModel, AnswersAsTheArenaDoes) {
  std::mt19937 random(5);
  for (int round = 0; round < 50; ++round) {
    const uint64_t size = (1 + random() % 64) * 4096;
    Arena arena(Memory::on(at::kCPU, size));
    ArenaModel model(size);
    std::vector<uint64_t> taken;
    for (int i = 0; i < 300; ++i) {
      if (!taken.empty() && random() % 2 == 0) {
        const size_t victim = random() % taken.size();
        arena.release(taken[victim]);
        model.release(taken[victim]);
        taken.erase(taken.begin() + static_cast<std::ptrdiff_t>(victim));
        continue;
      }
      const uint64_t bytes = random() % (size / 2 + 1);
      const bool in_turn = random() % 2 == 0;
      std::optional<uint64_t> expected =
          in_turn ? arena.allocate_in_turn(bytes) : arena.allocate(bytes);
      EXPECT_EQ(in_turn ? model.allocate_in_turn(bytes) : model.allocate(bytes),
                expected.value_or(ArenaModel::kNone));
      if (expected) taken.push_back(*expected);
    }
  }
  EXPECT_THROW(ArenaModel(4096).release(0), Error);
}

}  // namespace
}  // namespace ferry::offload
