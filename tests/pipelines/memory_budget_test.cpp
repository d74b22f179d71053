#include "ferry/pipelines/memory_budget.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "../io/temp_folder.h"
#include "ferry/base/error.h"
#include "ferry/base/system_info.h"
#include "ferry/models/autoencoders/autoencoder.h"
#include "ferry/models/costs.h"

namespace ferry::pipelines {
namespace {

using ::testing::HasSubstr;
using testing_io::error_of;

constexpr uint64_t kMiB = 1 << 20;

std::shared_ptr<DiffusionPipeline> shapes() {
  return DiffusionPipeline::from_pretrained(FERRY_MODELS "/shapes");
}

// With 100 MiB for the program.
MemorySplit split(const DiffusionPipeline& pipeline, const GenerationSize& size, uint64_t total,
                  uint64_t reserve = 0) {
  return split_memory(pipeline, size, at::kCPU,
                      {.memory_bytes = total,
                       .reserve_bytes = reserve,
                       .program_bytes = 100 * kMiB,
                       .least_weights_bytes = 1 * kMiB});
}

TEST(MemoryBudget, SplitsATotal) {
  auto pipeline = shapes();
  const GenerationSize size{.width = 64, .height = 64, .text_tokens = 24};
  const MemorySplit whole =
      split_memory(*pipeline, size, at::kCPU, {.memory_bytes = uint64_t{4} << 30});
  EXPECT_TRUE(whole.all_fit());
  EXPECT_FALSE(whole.tile_vae);
  EXPECT_EQ(whole.program_bytes + whole.activation_bytes + whole.weights_bytes, whole.total_bytes);
  EXPECT_GT(whole.activation_bytes, 100u << 10);
  EXPECT_LT(whole.activation_bytes, 100u << 20);
  EXPECT_THAT(whole.describe(), HasSubstr("4.00 GiB"));
}

TEST(MemoryBudget, WhatIsReservedIsTaken) {
  auto pipeline = shapes();
  const GenerationSize size{.width = 64, .height = 64, .text_tokens = 24};
  const MemorySplit all = split(*pipeline, size, 1024 * kMiB);
  const MemorySplit part = split(*pipeline, size, 1024 * kMiB, 300 * kMiB);
  EXPECT_EQ(all.weights_bytes, part.weights_bytes + 300 * kMiB);
  EXPECT_THAT(part.describe(), HasSubstr("300 MiB reserved"));
  const std::string message =
      error_of<BudgetError>([&] { split(*pipeline, size, 1024 * kMiB, 1000 * kMiB); });
  EXPECT_THAT(message, HasSubstr("1000 MiB reserved"));
  EXPECT_THAT(message, HasSubstr("give at least"));
}

TEST(MemoryBudget, ADecodeThatDoesNotFitIsTiled) {
  auto pipeline = shapes();
  const GenerationSize size{.width = 2048, .height = 2048, .text_tokens = 24};
  const MemorySplit roomy = split(*pipeline, size, uint64_t{64} << 30);
  ASSERT_EQ(roomy.largest, "vae");
  ASSERT_FALSE(roomy.tile_vae);
  const MemorySplit tight = split(*pipeline, size, 100 * kMiB + roomy.activation_bytes - 32 * kMiB);
  EXPECT_TRUE(tight.tile_vae);
  EXPECT_LT(tight.activation_bytes, roomy.activation_bytes);
}

// Down from what holds everything: the decode takes one picture after the other, and the
// transformer's batch goes to fewer and fewer pictures a pass.
TEST(MemoryBudget, ABatchThatDoesNotFitIsSplit) {
  auto pipeline = shapes();
  // Latents so fine that the transformer needs most.
  const GenerationSize size{
      .width = 256, .height = 256, .batch = 8, .text_tokens = 64, .vae_scale_factor = 2};
  uint64_t total = split(*pipeline, size, uint64_t{64} << 30).activation_bytes + 102 * kMiB;
  std::vector<int64_t> pictures;
  bool sliced = false, tiled = false;
  MemorySplit last;
  for (;;) {
    try {
      last = split(*pipeline, size, total);
    } catch (const BudgetError&) {
      break;
    }
    EXPECT_LE(last.program_bytes + last.activation_bytes + last.weights_bytes, total);
    EXPECT_GE(last.slice_vae, sliced) << "came back";
    EXPECT_GE(last.tile_vae, tiled) << "came back";
    sliced = last.slice_vae;
    tiled = last.tile_vae;
    if (pictures.empty() || pictures.back() != last.pictures_per_pass)
      pictures.push_back(last.pictures_per_pass);
    total = total / 20 * 19;
  }
  EXPECT_TRUE(sliced);
  ASSERT_GE(pictures.size(), 3u);
  EXPECT_EQ(pictures.front(), 0);
  EXPECT_TRUE(std::is_sorted(pictures.rbegin(), pictures.rend() - 1)) << "fewer, the less there is";
  EXPECT_EQ(pictures.back(), 1);
  EXPECT_EQ(last.lockstep_turn, hooks::LockstepTurn::block);
  EXPECT_GT(last.arena_bytes, 0u);
  EXPECT_THAT(last.describe(), HasSubstr("1 picture a pass"));
}

TEST(MemoryBudget, ASplitIsApplied) {
  auto pipeline = shapes();
  MemoryChoice choice;
  choice.split.weights_bytes = 6 * kMiB;
  choice.split.all_weights_bytes = 100 * kMiB;
  choice.split.pictures_per_pass = 2;
  choice.split.lockstep_turn = hooks::LockstepTurn::block;
  choice.split.arena_bytes = 3 * kMiB;
  choice.split.tile_vae = choice.split.slice_vae = true;
  apply_memory(*pipeline, choice, {});
  auto& vae = dynamic_cast<models::AutoencoderMixin&>(pipeline->model("vae"));
  ASSERT_TRUE(pipeline->engine());
  EXPECT_EQ(pipeline->engine()->options().weights_memory_bytes, 6 * kMiB);
  EXPECT_EQ(pipeline->engine()->options().preferred_arena_bytes, 3 * kMiB);
  EXPECT_EQ(pipeline->pictures_per_pass(), 2);
  EXPECT_EQ(pipeline->lockstep_turn(), hooks::LockstepTurn::block);
  EXPECT_TRUE(vae.tiling() && vae.slicing());

  // Another budget for the same engine; then everything fits, and streams on from memory.
  const auto engine = pipeline->engine();
  choice.split.weights_bytes = 8 * kMiB;
  choice.split.tile_vae = false;
  apply_memory(*pipeline, choice, {});
  EXPECT_EQ(pipeline->engine(), engine);
  EXPECT_EQ(engine->options().weights_memory_bytes, 8 * kMiB);
  EXPECT_FALSE(vae.tiling());

  choice.split = {};
  apply_memory(*pipeline, choice, {});
  EXPECT_FALSE(pipeline->engine());
  EXPECT_EQ(pipeline->pictures_per_pass(), 0);
}

TEST(MemoryBudget, TooLittleStatesWhatWouldDo) {
  auto pipeline = shapes();
  const GenerationSize size{.width = 512, .height = 512};
  EXPECT_THAT(error_of<BudgetError>([&] { split(*pipeline, size, 32 * kMiB); }),
              HasSubstr("give at least"));
}

TEST(MemoryBudget, SizesComeFromTheArguments) {
  auto pipeline = shapes();
  TextToImageArguments a;
  a.prompt = {"a", "b"};
  a.num_images_per_prompt = 3;
  GenerationSize size = generation_size(*pipeline, a);
  EXPECT_EQ(size.width, 64);  // what the autoencoder was trained on
  EXPECT_EQ(size.batch, 6);
  EXPECT_EQ(size.prompts, 2);
  EXPECT_FALSE(size.true_cfg);
  a.prompt = {};
  a.prompt_embeds = at::zeros({4, 24, 8});
  a.negative_prompt = "x";
  a.true_cfg_scale = 2;
  a.width = 32;
  size = generation_size(*pipeline, a);
  EXPECT_EQ(size, (GenerationSize{.width = 32,
                                  .height = 64,
                                  .batch = 12,
                                  .prompts = 4,
                                  .text_tokens = 24,
                                  .true_cfg = true,
                                  .vae_scale_factor = 4}));
}

TEST(MemoryBudget, WhatIsFreeLeavesRoomToOthers) {
  const FreeMemory free = usable_memory(at::kCPU);
  const uint64_t usable = memory_info().usable_bytes();
  EXPECT_GT(free.headroom_bytes, usable / 20);
  EXPECT_LT(free.usable_bytes, usable + current_rss_bytes());
  EXPECT_FALSE(parse_memory("auto", "--memory"));
  EXPECT_EQ(parse_memory("6MiB", "--memory"), 6 * kMiB);
  EXPECT_THROW(parse_memory("a lot", "--memory"), ArgumentError);
}

}  // namespace
}  // namespace ferry::pipelines
