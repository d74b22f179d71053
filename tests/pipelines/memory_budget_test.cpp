#include "ferry/pipelines/memory_budget.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "ferry/base/error.h"
#include "ferry/base/system_info.h"

namespace ferry::pipelines {
namespace {

std::shared_ptr<DiffusionPipeline> shapes() {
  return DiffusionPipeline::from_pretrained(FERRY_MODELS "/shapes");
}

TEST(MemoryBudget, SplitsATotal) {
  auto pipeline = shapes();
  const MemorySplit split = split_memory(*pipeline, {.width = 64, .height = 64, .text_tokens = 24},
                                         uint64_t{4} << 30, at::kCPU);
  EXPECT_TRUE(split.all_fit());
  EXPECT_FALSE(split.tile_vae);
  EXPECT_EQ(split.program_bytes + split.activation_bytes + split.weights_bytes, split.total_bytes);
  EXPECT_GT(split.activation_bytes, 100u << 10);
  EXPECT_LT(split.activation_bytes, 100u << 20);
  EXPECT_THAT(split.describe(), ::testing::HasSubstr("4.00 GiB"));
}

TEST(MemoryBudget, ADecodeThatDoesNotFitIsTiled) {
  auto pipeline = shapes();
  const GenerationSize size{.width = 2048, .height = 2048, .text_tokens = 24};
  const uint64_t program = current_rss_bytes();
  const MemorySplit roomy = split_memory(*pipeline, size, uint64_t{64} << 30, at::kCPU);
  ASSERT_EQ(roomy.largest, "vae");
  ASSERT_FALSE(roomy.tile_vae);
  const MemorySplit tight = split_memory(
      *pipeline, size, program + roomy.activation_bytes - (uint64_t{32} << 20), at::kCPU, 1 << 20);
  EXPECT_TRUE(tight.tile_vae);
  EXPECT_LT(tight.activation_bytes, roomy.activation_bytes);
}

TEST(MemoryBudget, TooLittleStatesWhatWouldDo) {
  auto pipeline = shapes();
  try {
    split_memory(*pipeline, {.width = 512, .height = 512}, uint64_t{32} << 20, at::kCPU);
    FAIL() << "accepted";
  } catch (const BudgetError& error) {
    EXPECT_THAT(error.what(), ::testing::HasSubstr("give at least"));
  }
}

TEST(MemoryBudget, WhatIsFreeLeavesRoomToOthers) {
  const FreeMemory free = usable_memory(at::kCPU);
  const uint64_t usable = memory_info().usable_bytes();
  EXPECT_GT(free.headroom_bytes, usable / 20);
  EXPECT_LT(free.usable_bytes, usable + current_rss_bytes());
}

}  // namespace
}  // namespace ferry::pipelines
