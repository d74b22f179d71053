#include "ferry/offload/plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "ferry/base/error.h"

namespace ferry::offload {
namespace {

constexpr uint64_t kMiB = 1 << 20;

std::vector<GroupCost> groups_of(const std::vector<uint64_t>& mib) {
  std::vector<GroupCost> groups;
  for (uint64_t size : mib)
    groups.push_back({"g" + std::to_string(groups.size()), size * kMiB, size * kMiB, false});
  return groups;
}

// "R" resident, "." streamed.
std::string text(const Plan& plan) {
  std::string line;
  for (Placement placement : plan.placements) line += placement == Placement::resident ? 'R' : '.';
  return line;
}

TEST(Plan, Table) {
  struct Row {
    std::vector<uint64_t> mib;
    uint64_t budget_mib, arena_mib;
    const char* expected;
  };
  const Row rows[] = {
      {{10, 10, 10, 10}, 40, 20, "RRRR"},                      // all fits: no arena
      {{10, 10, 10, 10}, 39, 20, "R..."},                      // 19 beside the arena
      {{10, 10, 10, 10, 10, 10, 10, 10}, 60, 20, ".R.R.R.R"},  // half, spread evenly
      {{10, 10, 10, 10}, 20, 20, "...."},                      // two largest pieces, no more
      {{10, 10, 10, 10}, 10, 20, "...."},                      // the least: one
      {{30, 1, 1, 1, 30}, 62, 20, ".RR.."},  // a group that does not fit is no reason to stop
  };
  for (const Row& row : rows) {
    PlanOptions options{row.budget_mib * kMiB, row.arena_mib * kMiB};
    Plan plan = make_plan(groups_of(row.mib), options);
    EXPECT_LE(plan.peak_bytes(), options.budget_bytes);
    std::string line = text(plan);
    EXPECT_EQ(std::count(line.begin(), line.end(), 'R'),
              std::count(row.expected, row.expected + line.size(), 'R'))
        << line << " for " << row.expected;
  }
}

TEST(Plan, SpreadsResidentsEvenly) {
  Plan plan = make_plan(groups_of(std::vector<uint64_t>(16, 10)),
                        {.budget_bytes = 100 * kMiB, .preferred_arena_bytes = 20 * kMiB});
  std::string line = text(plan);
  for (size_t i = 0; i + 4 <= line.size(); ++i) {
    EXPECT_NEAR(std::count(line.begin() + i, line.begin() + i + 4, 'R'), 2, 1) << line;
  }
}

TEST(Plan, TooSmallABudgetStatesTheLeast) {
  try {
    make_plan(groups_of({10, 44, 10}), {.budget_bytes = 43 * kMiB});
    FAIL() << "accepted";
  } catch (const BudgetError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("at least 44.0 MiB"));
  }
}

TEST(Plan, WhatOutlastsOthersStays) {
  std::vector<GroupCost> groups = groups_of({10, 10, 10, 10});
  groups[2].keep_resident = true;
  EXPECT_EQ(smallest_budget(groups), 20 * kMiB);
  EXPECT_EQ(
      text(make_plan(groups, {.budget_bytes = 30 * kMiB, .preferred_arena_bytes = 20 * kMiB})),
      "..R.");
  EXPECT_THROW(make_plan(groups, {.budget_bytes = 19 * kMiB}), BudgetError);
}

TEST(Plan, NeverOverBudget) {
  std::mt19937 random(3);
  for (int i = 0; i < 1000; ++i) {
    std::vector<uint64_t> mib(1 + random() % 30);
    for (uint64_t& size : mib) size = 1 + random() % 100;
    std::vector<GroupCost> groups = groups_of(mib);
    uint64_t budget = smallest_budget(groups) + random() % (600 * kMiB);
    Plan plan = make_plan(groups, {.budget_bytes = budget});
    EXPECT_LE(plan.peak_bytes(), budget);
    uint64_t resident = 0, streamed = 0;
    for (size_t g = 0; g < groups.size(); ++g) {
      (plan.placements[g] == Placement::resident ? resident : streamed) += groups[g].size_bytes;
    }
    EXPECT_EQ(plan.resident_bytes, resident);
    EXPECT_EQ(plan.streamed_bytes, streamed);
  }
}

}  // namespace
}  // namespace ferry::offload
