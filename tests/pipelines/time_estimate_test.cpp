#include "ferry/pipelines/time_estimate.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "../io/temp_folder.h"

namespace ferry::pipelines {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

class Estimate : public ::testing::Test {
 protected:
  Estimate()
      : pipeline_(DiffusionPipeline::from_pretrained(FERRY_MODELS "/shapes")),
        measurements_(folder_ / "measurements") {
    arguments_.prompt = "a red circle";
    arguments_.width = 48;
    arguments_.height = 32;
    arguments_.num_inference_steps = 4;
    arguments_.max_sequence_length = 16;
    arguments_.output_type = OutputType::latent;
    size_ = generation_size(*pipeline_, arguments_);
  }
  TimeEstimate estimate(std::optional<uint64_t> budget, uint64_t rate = 0) const {
    return estimate_time(*pipeline_, size_, arguments_.num_inference_steps, at::kCPU, budget, rate,
                         measurements_);
  }

  testing_io::TempFolder folder_;
  std::shared_ptr<DiffusionPipeline> pipeline_;
  offload::Measurements measurements_;
  TextToImageArguments arguments_;
  GenerationSize size_;
};

TEST_F(Estimate, NothingIsInvented) {
  const TimeEstimate unknown = estimate({});
  EXPECT_FALSE(unknown.step_s);
  EXPECT_EQ(unknown.steps, 4);
  EXPECT_THAT(unknown.describe(), HasSubstr("not known"));
  const TimeEstimate streamed = estimate(2 << 20);
  EXPECT_FALSE(streamed.step_s);
  EXPECT_GT(streamed.streamed_bytes, 0u);
  EXPECT_THAT(streamed.describe(), HasSubstr("are read every step"));
}

TEST_F(Estimate, ARunIsRemembered) {
  pipeline_->text_to_image(arguments_);
  pipeline_->text_to_image(arguments_);
  remember_times(*pipeline_, size_, at::kCPU, measurements_);
  const double measured = pipeline_->compute_times().at("transformer").shortest_s;
  const TimeEstimate resident = estimate({});
  ASSERT_TRUE(resident.step_s);
  EXPECT_NEAR(*resident.step_s, measured, 1e-6 + 0.01 * measured);
  EXPECT_EQ(resident.bound, offload::Bound::compute);
  EXPECT_THAT(resident.describe(), HasSubstr("4 steps in about"));
  EXPECT_THAT(resident.describe(), HasSubstr("limited by computing"));

  // Streamed: how fast this disk reads was not seen, unless a limit says it.
  EXPECT_FALSE(estimate(2 << 20).step_s);
  EXPECT_THAT(estimate(2 << 20).describe(), HasSubstr("no run has shown how fast the disk is"));
  const TimeEstimate slow = estimate(2 << 20, 1'000'000);
  ASSERT_TRUE(slow.step_s);
  EXPECT_EQ(slow.bound, offload::Bound::disk);
  EXPECT_NEAR(*slow.step_s, static_cast<double>(slow.streamed_bytes) / 1e6, 0.2 * *slow.step_s);
  ASSERT_TRUE(slow.next_gib_step_s);
  EXPECT_LT(*slow.next_gib_step_s, *slow.step_s);
  EXPECT_THAT(slow.describe(), HasSubstr("limited by the disk; with 1 GiB more memory"));

  // Another size is another measurement.
  size_.width = 64;
  EXPECT_FALSE(estimate({}).step_s);
}

TEST_F(Estimate, DefaultStepsAreThePipelines) {
  arguments_.num_inference_steps.reset();
  EXPECT_EQ(estimate({}).steps, 28);
}

}  // namespace
}  // namespace ferry::pipelines
