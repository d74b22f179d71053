// FluxPipeline against pictures that Python diffusers made (tests/fixtures/README.md), and what
// holds whatever the picture is.
#include "ferry/pipelines/flux/pipeline_flux.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "../io/temp_folder.h"
#include "ferry/base/error.h"
#include "ferry/testing/pipeline_suites.h"
#include "ferry/testing/test_device.h"
#include "ferry/weights/binding.h"

namespace ferry::pipelines {
namespace {

namespace fs = std::filesystem;
using ferry::testing::PipelineCase;
using ::testing::HasSubstr;
using testing_io::error_of;
using testing_io::TempFolder;

const fs::path kFolder = fs::path(FERRY_FIXTURES) / "pipelines/flux-tiny";

std::shared_ptr<FluxPipeline> load(const PipelineLoadOptions& options = {}) {
  return std::dynamic_pointer_cast<FluxPipeline>(
      DiffusionPipeline::from_pretrained(kFolder.string(), options));
}

FluxPipelineArguments small(int64_t seed = 7) {
  FluxPipelineArguments a;
  a.prompt = "a large red circle on a white background";
  a.height = 32;
  a.width = 48;
  a.num_inference_steps = 2;
  a.max_sequence_length = 32;
  a.output_type = OutputType::latent;
  a.generator = {tensor::Generator().manual_seed(seed)};
  return a;
}

nlohmann::json read_json(const fs::path& path) {
  return nlohmann::json::parse(std::ifstream(path));
}

class Picture : public ::testing::TestWithParam<const char*> {};

TEST_P(Picture, IsPythonsWithinOneStep) {
  at::set_num_threads(1);
  std::string stem = GetParam();
  auto call = read_json(kFolder / (stem + ".json"));
  auto expected = weights::Checkpoint::open_file(kFolder / (stem + ".safetensors"));
  at::Device device = testing::test_device();
  for (bool streamed : {false, true}) {
    if (streamed && !device.is_cpu()) continue;
    auto pipeline = load();
    pipeline->to(device);
    if (streamed) pipeline->set_memory_budget(256 << 10);
    FluxPipelineArguments a;
    a.prompt = call["prompt"].is_array() ? Texts(call["prompt"].get<std::vector<std::string>>())
                                         : Texts(call["prompt"].get<std::string>());
    if (call.contains("negative_prompt"))
      a.negative_prompt = Texts(call["negative_prompt"].get<std::string>());
    a.true_cfg_scale = call.value("true_cfg_scale", 1.0);
    a.guidance_scale = call.value("guidance_scale", 3.5);
    a.height = call["height"].get<int64_t>();
    a.width = call["width"].get<int64_t>();
    a.num_inference_steps = call["num_inference_steps"];
    a.max_sequence_length = call["max_sequence_length"];
    a.num_images_per_prompt = call.value("num_images_per_prompt", 1);
    a.output_type = OutputType::latent;
    a.generator = {tensor::Generator().manual_seed(call["seed"].get<uint64_t>())};
    at::Tensor latents = (*pipeline)(a).tensor.cpu();
    at::Tensor expected_latents = weights::read_stored(*expected->find("latents"));
    ASSERT_EQ(latents.sizes(), expected_latents.sizes());
    EXPECT_LT((latents - expected_latents).abs().max().item<double>(), 1e-4)
        << "streamed: " << streamed;

    a.output_type = OutputType::np;
    a.generator = {tensor::Generator().manual_seed(call["seed"].get<uint64_t>())};
    at::Tensor picture = (*pipeline)(a).tensor;
    at::Tensor difference =
        at::round(picture * 255) - at::round(weights::read_stored(*expected->find("image")) * 255);
    EXPECT_LE(difference.abs().max().item<double>(), 1.0) << "streamed: " << streamed;
    if (streamed) {
      EXPECT_GT(pipeline->engine()->report().bytes_read, 0u);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Calls, Picture,
                         ::testing::Values("expected", "expected_true_cfg", "expected_two_images",
                                           "expected_two_prompts"));

PipelineCase tiny() {
  TextToImageArguments a;
  a.prompt = "a large red circle on a white background";
  a.height = 32;
  a.width = 48;
  a.num_inference_steps = 2;
  a.max_sequence_length = 32;
  return {.name = "FluxTiny", .folder = kFolder, .arguments = a};
}

}  // namespace
}  // namespace ferry::pipelines

namespace ferry::testing {
INSTANTIATE_TEST_SUITE_P(Pipelines, PipelineTester, ::testing::Values(pipelines::tiny()),
                         pipeline_case_name);
}  // namespace ferry::testing

namespace ferry::pipelines {
namespace {

TEST(FluxPipeline, ReadsTheIndexAndKeepsIt) {
  auto pipeline = load();
  EXPECT_EQ(pipeline->class_name(), "FluxPipeline");
  EXPECT_FALSE(pipeline->has("image_encoder"));
  EXPECT_TRUE(pipeline->has("tokenizer_2"));
  EXPECT_EQ(pipeline->config()["image_encoder"], nlohmann::json::parse("[null, null]"));
  EXPECT_EQ(pipeline->vae_scale_factor(), 2);
}

TEST(FluxPipeline, EmbeddingsStandForThePrompt) {
  auto pipeline = load();
  auto a = small();
  auto embeds = pipeline->encode_prompt(a.prompt, a.prompt, 1, 32);
  auto b = small();
  b.prompt = {};
  b.prompt_embeds = embeds.prompt_embeds;
  b.pooled_prompt_embeds = embeds.pooled_prompt_embeds;
  EXPECT_TRUE(at::equal((*pipeline)(a).tensor, (*pipeline)(b).tensor));
}

TEST(FluxPipeline, GivenLatentsAreTheStart) {
  auto pipeline = load();
  auto drawn = tensor::randn_tensor({1, 4, 16, 24}, {tensor::Generator().manual_seed(7)});
  auto a = small();
  a.generator.clear();
  a.latents = FluxPipeline::pack_latents(drawn);
  EXPECT_TRUE(at::equal((*pipeline)(a).tensor, (*pipeline)(small()).tensor));
  EXPECT_TRUE(at::equal(FluxPipeline::unpack_latents(*a.latents, 32, 48, 2), drawn));
}

TEST(FluxPipeline, ComponentsCanBeReplaced) {
  auto first = load();
  auto other = models::load_model(kFolder / "transformer");
  PipelineLoadOptions options;
  options.components["transformer"] = Component(other);
  auto second = load(options);
  EXPECT_EQ(&second->model("transformer"), other.get());
  EXPECT_TRUE(at::equal((*first)(small()).tensor, (*second)(small()).tensor));
  options.components["transformr"] = Component();
  EXPECT_THAT(error_of<ArgumentError>([&] { load(options); }), HasSubstr("transformr"));
}

TEST(FluxPipeline, AnotherKindOfAutoencoderIsRefused) {
  PipelineLoadOptions options;
  options.components["vae"] = Component(models::load_model(kFolder / "text_encoder"));
  EXPECT_THAT(error_of<ArgumentError>([&] { load(options); }),
              HasSubstr("expected an autoencoder"));
}

TEST(FluxPipeline, WrongArgumentsAreRefused) {
  auto pipeline = load();
  auto refused = [&](auto change) {
    auto a = small();
    change(a);
    return error_of<ArgumentError>([&] { (*pipeline)(a); });
  };
  EXPECT_THAT(refused([](auto& a) { a.prompt = {}; }), HasSubstr("prompt"));
  EXPECT_THAT(refused([](auto& a) {
                a.prompt_embeds = at::zeros({1, 2, 24});
              }),
              HasSubstr("only one of"));
  EXPECT_THAT(refused([](auto& a) {
                a.prompt = {};
                a.prompt_embeds = at::zeros({1, 2, 24});
              }),
              HasSubstr("pooled_prompt_embeds"));
  EXPECT_THAT(refused([](auto& a) { a.max_sequence_length = 513; }), HasSubstr("1 to 512"));
  EXPECT_THAT(refused([](auto& a) { a.callback_on_step_end_tensor_inputs = {"noise"}; }),
              HasSubstr("noise"));
  EXPECT_THAT(refused([](auto& a) { a.generator.resize(2); }), HasSubstr("2 generators"));
  EXPECT_THAT(refused([](auto& a) {
                a.latents = at::zeros({1, 3, 16});
              }),
              HasSubstr("[1, 96, 16]"));
  EXPECT_THAT(refused([](auto& a) { a.prompt_2 = Texts{"a", "b", "c"}; }), HasSubstr("prompt_2"));
}

TEST(FluxPipeline, BadFoldersAreExplained) {
  TempFolder folder;
  auto message = [&] {
    return error_of<Error>([&] { DiffusionPipeline::from_pretrained(folder.path().string()); });
  };
  EXPECT_THAT(message(), HasSubstr("model_index.json"));
  testing_io::write_text(folder / "model_index.json", R"({"_class_name": "NoSuchPipeline"})");
  EXPECT_THAT(message(), HasSubstr("FluxPipeline"));
  testing_io::write_text(folder / "model_index.json", R"({"_class_name": "FluxPipeline"})");
  EXPECT_THAT(message(), HasSubstr("scheduler"));
  testing_io::write_text(folder / "model_index.json", R"({"a": 1})");
  EXPECT_THAT(message(), HasSubstr("_class_name"));
  testing_io::write_text(
      folder / "model_index.json",
      R"({"_class_name": "FluxPipeline", "../vae": ["diffusers", "AutoencoderKL"]})");
  EXPECT_THAT(message(), HasSubstr("no folder name"));
  testing_io::write_text(folder / "model_index.json", "{");
  EXPECT_THAT(message(), HasSubstr("model_index.json"));
}

TEST(CalculateShift, GivesTheValuesOfDiffusers) {
  EXPECT_NEAR(calculate_shift(256), 0.5, 1e-12);
  EXPECT_NEAR(calculate_shift(4096), 1.15, 1e-12);
  EXPECT_NEAR(calculate_shift(1024), 0.63, 1e-12);
}

TEST(DtypeMap, ReadsListsOfNames) {
  DtypeMap map = DtypeMap::parse("bf16,vae=fp32");
  EXPECT_EQ(map.of("vae"), at::kFloat);
  EXPECT_EQ(map.of("transformer"), at::kBFloat16);
  EXPECT_FALSE(DtypeMap::parse("").of("vae"));
  EXPECT_THROW(DtypeMap::parse("vae=int7"), ArgumentError);
}

}  // namespace
}  // namespace ferry::pipelines
