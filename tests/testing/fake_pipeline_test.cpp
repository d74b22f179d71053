// A whole pipeline on the fake accelerator, under each of diffusers' ways to offload it: the
// latents are those that the CPU computes with all weights in memory.
#include <ATen/ATen.h>
#include <gmock/gmock.h>

#include <cstdlib>

#include "ferry/base/error.h"
#include "ferry/pipelines/pipeline.h"
#include "ferry/testing/fake_accelerator.h"
#include "ferry/weights/stub.h"

namespace ferry::testing {
namespace {

class FakePipelineTest : public ::testing::Test {
 protected:
  FakePipelineTest() {
    ::setenv("FERRY_LINEAR_KERNEL", "native", /*overwrite=*/0);
    device_ = FakeAccelerator::install();
    FakeAccelerator::set_options({});
    expected_ = latents(*load());
  }
  static std::shared_ptr<pipelines::DiffusionPipeline> load() {
    return pipelines::DiffusionPipeline::from_pretrained(FERRY_FIXTURES "/pipelines/flux-tiny");
  }
  static at::Tensor latents(pipelines::DiffusionPipeline& pipeline) {
    pipelines::TextToImageArguments arguments;
    arguments.prompt = "a large red circle on a white background";
    arguments.height = 32;
    arguments.width = 48;
    arguments.num_inference_steps = 2;
    arguments.max_sequence_length = 32;
    arguments.output_type = pipelines::OutputType::latent;
    arguments.generator = {tensor::Generator().manual_seed(7)};
    return pipeline.text_to_image(arguments).tensor.to(at::kCPU);
  }
  void expect_right(pipelines::DiffusionPipeline& pipeline) const {
    for (int run = 0; run < 2; ++run) EXPECT_TRUE(at::equal(latents(pipeline), expected_));
  }
  static uint64_t weight_bytes(const pipelines::DiffusionPipeline& pipeline) {
    uint64_t bytes = 0;
    for (const auto& [name, component] : pipeline.components())
      if (component.model) bytes += weights::total_bytes(weights::collect_slots(*component.model));
    return bytes;
  }

  at::Device device_{at::kCPU};
  at::Tensor expected_;
};

TEST_F(FakePipelineTest, GroupOffloadThroughOneEngine) {
  for (auto type : {hooks::OffloadType::leaf_level, hooks::OffloadType::block_level}) {
    for (uint64_t host : {uint64_t{0}, offload::EngineOptions::kAllWeights}) {
      auto pipeline = load();
      offload::EngineOptions options;
      options.device = device_;
      options.weights_memory_bytes = weight_bytes(*pipeline);
      options.host_memory_bytes = host;
      options.preferred_arena_bytes = 64 << 10;
      auto engine = std::make_shared<offload::Engine>(options);
      pipeline->enable_group_offload(engine, {.offload_type = type});
      expect_right(*pipeline);
      EXPECT_LE(engine->report().peak_bytes, options.weights_memory_bytes);
      EXPECT_GT(engine->report().bytes_copied, 0u);
      pipeline->disable_group_offload();
      pipeline->to(device_);
      expect_right(*pipeline);
    }
  }
}

TEST_F(FakePipelineTest, ExcludedComponentsStay) {
  auto pipeline = load();
  offload::EngineOptions options;
  options.device = device_;
  auto engine = std::make_shared<offload::Engine>(options);
  pipeline->enable_group_offload(engine, {}, {"vae", "text_encoder"});
  expect_right(*pipeline);
  for (const auto& [name, component] : pipeline->components()) {
    if (!component.model) continue;
    const bool excluded = name == "vae" || name == "text_encoder";
    EXPECT_EQ(component.model->weights_are_offloaded(), !excluded) << name;
    EXPECT_EQ(component.model->device(), device_) << name;
  }
  EXPECT_THROW(load()->enable_group_offload(engine, {}, {"no_such_component"}), ArgumentError);
}

TEST_F(FakePipelineTest, ModelCpuOffloadHoldsOneComponentAtATime) {
  auto pipeline = load();
  pipeline->enable_model_cpu_offload(device_);
  expect_right(*pipeline);
  const offload::Report report = pipeline->engine()->report();
  EXPECT_LE(report.peak_bytes, pipeline->engine()->options().weights_memory_bytes);
  // All of it waits in host memory: a further run reads no more from disk.
  latents(*pipeline);
  EXPECT_EQ(pipeline->engine()->report().bytes_read, report.bytes_read);
}

TEST_F(FakePipelineTest, SequentialCpuOffloadHoldsOneLayerAtATime) {
  auto pipeline = load();
  pipeline->enable_sequential_cpu_offload(device_);
  expect_right(*pipeline);
  const uint64_t sequential = pipeline->engine()->report().peak_bytes;
  pipeline->disable_group_offload();
  pipeline->enable_model_cpu_offload(device_);
  expect_right(*pipeline);
  EXPECT_LT(sequential, pipeline->engine()->report().peak_bytes);
}

}  // namespace
}  // namespace ferry::testing
