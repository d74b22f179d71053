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
#include "ferry/weights/binding.h"

namespace ferry::pipelines {
namespace {

namespace fs = std::filesystem;
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
  for (bool streamed : {false, true}) {
    auto pipeline = load();
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
    at::Tensor latents = (*pipeline)(a).tensor;
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

TEST(FluxPipeline, ReadsTheIndexAndKeepsIt) {
  auto pipeline = load();
  EXPECT_EQ(pipeline->class_name(), "FluxPipeline");
  EXPECT_FALSE(pipeline->has("image_encoder"));
  EXPECT_TRUE(pipeline->has("tokenizer_2"));
  EXPECT_EQ(pipeline->config()["image_encoder"], nlohmann::json::parse("[null, null]"));
  EXPECT_EQ(pipeline->vae_scale_factor(), 2);
}

TEST(FluxPipeline, SavedAndLoadedGivesTheSamePicture) {
  TempFolder folder;
  // A scalar that lives in the index, and one that nobody knows.
  fs::copy(kFolder, folder / "in", fs::copy_options::recursive);
  auto index = read_json(folder / "in/model_index.json");
  index["force_zeros_for_empty_prompt"] = true;
  index["from_a_newer_version"] = {1, 2, 3};
  testing_io::write_text(folder / "in/model_index.json", index.dump());

  auto first = std::dynamic_pointer_cast<FluxPipeline>(
      DiffusionPipeline::from_pretrained((folder / "in").string()));
  first->save_pretrained(folder / "out");
  EXPECT_EQ(read_json(folder / "out/model_index.json"), index);
  auto second = std::dynamic_pointer_cast<FluxPipeline>(
      DiffusionPipeline::from_pretrained((folder / "out").string()));
  EXPECT_TRUE(at::equal((*first)(small()).tensor, (*second)(small()).tensor));
}

TEST(FluxPipeline, StreamedIsBitIdenticalToResident) {
  auto pipeline = load();
  at::Tensor resident = (*pipeline)(small()).tensor;
  auto streamed = load();
  streamed->set_memory_budget(224 << 10);
  EXPECT_TRUE(at::equal((*streamed)(small()).tensor, resident));
  hooks::GroupOffloadingConfig blocks;
  blocks.offload_type = hooks::OffloadType::block_level;
  offload::EngineOptions options;
  options.weights_memory_bytes = 1 << 20;
  streamed->enable_group_offload(std::make_shared<offload::Engine>(options), blocks);
  EXPECT_TRUE(at::equal((*streamed)(small()).tensor, resident));
  streamed->disable_group_offload();
  EXPECT_TRUE(at::equal((*streamed)(small()).tensor, resident));
}

TEST(FluxPipeline, CallbackSeesAndReplacesTensors) {
  auto pipeline = load();
  std::vector<int64_t> steps;
  std::vector<double> times;
  auto a = small();
  a.callback_on_step_end_tensor_inputs = {"latents", "prompt_embeds"};
  a.callback_on_step_end = [&](FluxPipeline& p, int64_t step, const at::Tensor& timestep,
                               const CallbackTensors& tensors) {
    EXPECT_EQ(&p, pipeline.get());
    EXPECT_EQ(tensors.at("prompt_embeds").size(1), 32);
    steps.push_back(step);
    times.push_back(timestep.item<double>());
    if (step == 1) return CallbackTensors{{"latents", at::zeros_like(tensors.at("latents"))}};
    return CallbackTensors{};
  };
  at::Tensor latents = (*pipeline)(a).tensor;
  EXPECT_EQ(steps, (std::vector<int64_t>{0, 1}));
  EXPECT_GT(times[0], times[1]);
  EXPECT_EQ(latents.abs().max().item<double>(), 0);
}

TEST(FluxPipeline, InterruptSkipsTheRest) {
  auto pipeline = load();
  auto a = small();
  a.num_inference_steps = 5;
  int calls = 0;
  a.callback_on_step_end = [&](FluxPipeline& p, int64_t step, const at::Tensor&,
                               const CallbackTensors&) {
    ++calls;
    if (step == 1) p.set_interrupt(true);
    return CallbackTensors{};
  };
  (*pipeline)(a);
  EXPECT_EQ(calls, 2);
}

TEST(FluxPipeline, StopsBetweenBlocks) {
  auto pipeline = load();
  StopSource stop;
  auto a = small();
  a.stop = stop.token();
  a.num_inference_steps = 50;
  a.progress = [&](const Progress& progress) {
    if (progress.stage == "denoise" && progress.step == 1) stop.request_stop();
  };
  EXPECT_THROW((*pipeline)(a), Cancelled);
  // and works again afterwards
  EXPECT_NO_THROW((*pipeline)(small()));
}

TEST(FluxPipeline, ProgressCountsEveryStage) {
  auto pipeline = load();
  auto a = small();
  a.output_type = OutputType::image;
  std::vector<std::string> seen;
  a.progress = [&](const Progress& p) {
    seen.push_back(fmt::format("{} {}/{}", p.stage, p.step, p.total));
  };
  auto output = (*pipeline)(a);
  EXPECT_THAT(seen, ::testing::ElementsAre("encode 0/1", "encode 1/1", "denoise 0/2", "denoise 1/2",
                                           "denoise 2/2", "decode 0/1", "decode 1/1"));
  ASSERT_EQ(output.images.size(), 1u);
  EXPECT_EQ(output.images[0].width, 48);
  EXPECT_EQ(output.images[0].height, 32);
}

// One generator for each picture makes a picture independent of the batch around it.
TEST(FluxPipeline, BatchIsConsistentWithSinglePictures) {
  auto pipeline = load();
  auto batch = small();
  batch.prompt = {"a red circle", "two tiny green stars"};
  batch.generator = {tensor::Generator().manual_seed(1), tensor::Generator().manual_seed(2)};
  at::Tensor together = (*pipeline)(batch).tensor;
  ASSERT_EQ(together.size(0), 2);
  for (int64_t i = 0; i < 2; ++i) {
    auto one = small(1 + i);
    one.prompt = batch.prompt[i];
    EXPECT_LT(((*pipeline)(one).tensor[0] - together[i]).abs().max().item<double>(), 1e-4) << i;
  }
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

TEST(FluxPipeline, MixedDtypesWork) {
  PipelineLoadOptions options;
  options.dtype = DtypeMap::parse("bf16,vae=fp32");
  auto pipeline = load(options);
  EXPECT_EQ(pipeline->model("transformer").dtype(), at::kBFloat16);
  EXPECT_EQ(pipeline->model("vae").dtype(), at::kFloat);
  auto a = small();
  a.output_type = OutputType::pt;
  at::Tensor picture = (*pipeline)(a).tensor;
  EXPECT_TRUE(at::isfinite(picture).all().item<bool>());
  EXPECT_EQ(picture.sizes(), at::IntArrayRef({1, 3, 32, 48}));
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

TEST(FluxPipeline, TooSmallABudgetNamesTheLeast) {
  auto pipeline = load();
  EXPECT_THROW(pipeline->set_memory_budget(100), BudgetError);
  EXPECT_FALSE(pipeline->engine());
  EXPECT_NO_THROW((*pipeline)(small()));
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
