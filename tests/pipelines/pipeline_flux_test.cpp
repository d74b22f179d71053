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
#include "ferry/weights/stub.h"

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
  return {.name = "FluxTiny",
          .folder = kFolder,
          .arguments = a,
          .sizes = {{128, 96, 1}, {128, 128, 3}}};
}

// The trained pipeline, in bfloat16.
PipelineCase shapes() {
  TextToImageArguments a;
  a.prompt = "a large red circle on a white background";
  a.height = 64;
  a.width = 64;
  a.num_inference_steps = 2;
  a.max_sequence_length = 24;
  return {.name = "FluxShapes",
          .folder = fs::path(FERRY_MODELS) / "shapes",
          .arguments = a,
          .sizes = {{256, 256, 1}, {256, 256, 3}}};
}

}  // namespace
}  // namespace ferry::pipelines

namespace ferry::testing {
INSTANTIATE_TEST_SUITE_P(Pipelines, PipelineTester, ::testing::Values(pipelines::tiny()),
                         pipeline_case_name);
INSTANTIATE_TEST_SUITE_P(Pipelines, PipelineBudgetTester,
                         ::testing::Values(pipelines::tiny(), pipelines::shapes()),
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

// Counts the calls of a model.
class CallCounter : public nn::ModuleHook {
 public:
  explicit CallCounter(models::Model& model) : model_(model) {
    model.add_hook("count", std::shared_ptr<nn::ModuleHook>(this, [](nn::ModuleHook*) {}));
  }
  ~CallCounter() override { model_.remove_hook("count"); }
  void before(nn::Module&) override { ++calls; }
  int calls = 0;

 private:
  models::Model& model_;
};

TEST(FluxPipeline, APromptIsEncodedOnce) {
  for (bool streamed : {false, true}) {
    SCOPED_TRACE(streamed ? "streamed" : "resident");
    auto pipeline = load();
    if (streamed) pipeline->set_memory_budget(256 << 10);
    CallCounter clip(pipeline->model("text_encoder")), t5(pipeline->model("text_encoder_2"));
    const at::Tensor first = (*pipeline)(small()).tensor;
    EXPECT_EQ(clip.calls, 1);
    EXPECT_TRUE(at::equal((*pipeline)(small()).tensor, first));
    EXPECT_EQ(clip.calls, 1);
    EXPECT_EQ(t5.calls, 1);

    if (streamed) {  // nor are their weights read
      const offload::Report before = pipeline->engine()->report();
      auto a = small();
      pipeline->encode_prompt(a.prompt, a.prompt, 1, 32);
      EXPECT_EQ(pipeline->engine()->report().bytes_read, before.bytes_read);
      EXPECT_EQ(pipeline->engine()->report().leases, before.leases);
    }

    // What they see is another: a longer sequence is T5's affair alone.
    auto longer = small();
    longer.max_sequence_length = 48;
    EXPECT_FALSE(at::equal((*pipeline)(longer).tensor, first));
    EXPECT_EQ(clip.calls, 1);
    EXPECT_EQ(t5.calls, 2);

    // With a negative prompt only that one is new.
    auto guided = small();
    guided.negative_prompt = "stars";
    guided.true_cfg_scale = 2;
    (*pipeline)(guided);
    EXPECT_EQ(clip.calls, 2);
    EXPECT_EQ(t5.calls, 3);
    EXPECT_TRUE(at::equal((*pipeline)(small()).tensor, first));

    pipeline->prompt_cache().set_limit(0);
    EXPECT_TRUE(at::equal((*pipeline)(small()).tensor, first));
    EXPECT_EQ(clip.calls, 3);
  }
}

// A change of the encoders' weights is a change of what they give, resident or streamed.
TEST(FluxPipeline, RememberedPromptsDoNotOutliveTheWeights) {
  const std::string weight = "encoder.layers.0.mlp.fc1.weight";
  auto change = [&](FluxPipeline& pipeline) {
    for (const weights::Slot& slot : weights::collect_slots(pipeline.model("text_encoder"))) {
      at::Tensor tensor = slot.tensor;
      if (slot.name() == weight) tensor.set_data(at::full(tensor.sizes(), 0.02));
    }
  };
  auto changed_first = load();
  change(*changed_first);
  const at::Tensor expected = (*changed_first)(small()).tensor;
  for (bool streamed : {false, true}) {
    SCOPED_TRACE(streamed ? "streamed" : "resident");
    auto pipeline = load();
    if (streamed) {
      offload::EngineOptions options;
      options.weights_memory_bytes = 1 << 20;
      options.small_slot_bytes = 0;  // so that the weight is one that comes and goes
      pipeline->enable_group_offload(std::make_shared<offload::Engine>(options));
    }
    const at::Tensor before = (*pipeline)(small()).tensor;
    change(*pipeline);
    EXPECT_TRUE(at::equal((*pipeline)(small()).tensor, expected));
    EXPECT_FALSE(at::equal(before, expected));
    CallCounter clip(pipeline->model("text_encoder"));
    EXPECT_TRUE(at::equal((*pipeline)(small()).tensor, expected));
    EXPECT_EQ(clip.calls, 0);
  }
}

// What a callback does to the embeddings stays there.
TEST(FluxPipeline, RememberedPromptsAreNobodysToChange) {
  auto pipeline = load();
  const at::Tensor first = (*pipeline)(small()).tensor;
  auto a = small();
  a.callback_on_step_end_tensor_inputs = {"prompt_embeds"};
  a.callback_on_step_end = [](DiffusionPipeline&, int64_t, const at::Tensor&,
                              const CallbackTensors& tensors) {
    tensors.at("prompt_embeds").zero_();
    return CallbackTensors{};
  };
  EXPECT_FALSE(at::equal((*pipeline)(a).tensor, first));
  EXPECT_TRUE(at::equal((*pipeline)(small()).tensor, first));
}

TEST(FluxPipeline, PromptsBecomeEmbeddingsThatTakeTheirPlace) {
  auto pipeline = load();
  TextToImageArguments a;
  static_cast<CommonArguments&>(a) = small();
  a.height = 32;
  a.width = 48;
  a.num_inference_steps = 2;
  a.max_sequence_length = 32;
  a.negative_prompt = "stars";
  a.true_cfg_scale = 2;
  const at::Tensor expected = pipeline->text_to_image(a).tensor;
  const CallbackTensors embeds = pipeline->encode_prompts(a);
  ASSERT_EQ(embeds.size(), 4u);

  // The text encoders are not there at all.
  auto without = load({.without_text_encoders = true});
  EXPECT_FALSE(without->has("text_encoder") || without->has("tokenizer_2"));
  TextToImageArguments b;
  static_cast<CommonArguments&>(b) = small();
  b.height = 32;
  b.width = 48;
  b.num_inference_steps = 2;
  b.true_cfg_scale = 2;
  b.prompt = {};
  b.prompt_embeds = embeds.at("prompt_embeds");
  b.pooled_prompt_embeds = embeds.at("pooled_prompt_embeds");
  b.negative_prompt_embeds = embeds.at("negative_prompt_embeds");
  b.negative_pooled_prompt_embeds = embeds.at("negative_pooled_prompt_embeds");
  EXPECT_TRUE(at::equal(without->text_to_image(b).tensor, expected));

  b.generator = {tensor::Generator().manual_seed(7)};
  b.negative_prompt_embeds.reset();
  b.prompt_embeds = at::zeros({1, 32, 3});
  EXPECT_THAT(error_of<ArgumentError>([&] { without->text_to_image(b); }),
              HasSubstr("got [1, 32, 3]"));
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

// A batch in passes of fewer pictures: each pass is what it is alone, and streamed weights cross
// once a step for all of them.
TEST(FluxPipeline, ABatchInPassesInLockstep) {
  at::set_num_threads(1);
  auto load_shapes = [] {
    return std::dynamic_pointer_cast<FluxPipeline>(
        DiffusionPipeline::from_pretrained(FERRY_MODELS "/shapes"));
  };
  auto batch = [] {
    auto a = small();
    a.height = a.width = 64;
    a.num_inference_steps = 4;
    a.max_sequence_length = 24;
    a.num_images_per_prompt = 3;
    a.negative_prompt = "stars";
    a.true_cfg_scale = 2;
    return a;
  };
  auto resident = load_shapes();
  resident->set_pictures_per_pass(2);
  const at::Tensor in_turn = (*resident)(batch()).tensor;
  // Alone: the first two pictures, then the third, from the same noise.
  const at::Tensor noise = FluxPipeline::pack_latents(
      tensor::randn_tensor({3, 4, 16, 16}, {tensor::Generator().manual_seed(7)}, at::kBFloat16));
  for (auto [begin, count] : {std::pair{0, 2}, std::pair{2, 1}}) {
    auto alone = batch();
    alone.num_images_per_prompt = count;
    alone.latents = noise.narrow(0, begin, count);
    EXPECT_TRUE(at::equal((*load_shapes())(alone).tensor, in_turn.narrow(0, begin, count)));
  }

  auto streamed = [&] {
    auto pipeline = load_shapes();
    offload::EngineOptions options;
    options.weights_memory_bytes = 2560 << 10;
    options.preferred_arena_bytes = 2 << 20;
    pipeline->enable_group_offload(std::make_shared<offload::Engine>(options));
    return pipeline;
  };
  // Of a second run, when the order and the prompt are known.
  auto bytes = [&](FluxPipeline& pipeline, auto arguments) {
    pipeline(arguments());
    const uint64_t before = pipeline.engine()->report().bytes_read;
    const at::Tensor latents = pipeline(arguments()).tensor;
    return std::pair{pipeline.engine()->report().bytes_read - before, latents};
  };
  auto single = [&] {
    auto a = batch();
    a.num_images_per_prompt = 1;
    a.true_cfg_scale = 1;
    return a;
  };
  const uint64_t one_pass = bytes(*streamed(), single).first;
  ASSERT_GT(one_pass, 4u << 20) << "nothing is streamed";
  for (auto turn : {hooks::LockstepTurn::group, hooks::LockstepTurn::block}) {
    auto pipeline = streamed();
    pipeline->set_pictures_per_pass(2);
    pipeline->set_lockstep_turn(turn);
    const auto [four_passes, latents] = bytes(*pipeline, batch);
    EXPECT_LT(four_passes, 2 * one_pass);
    EXPECT_TRUE(at::equal(latents, in_turn));
  }
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

TEST(FluxPipeline, AModelThatWasMadeInMemoryIsOffloadedToo) {
  auto first = load();
  const at::Tensor expected = (*first)(small()).tensor;
  auto loaded = models::load_model(kFolder / "transformer");
  loaded->load_weights();
  std::ifstream config(kFolder / "transformer" / "config.json");
  auto made = models::make_model("FluxTransformer2DModel", nlohmann::ordered_json::parse(config));
  const auto from = loaded->named_parameters();
  for (const auto& item : made->named_parameters()) {
    at::Tensor slot = item.value();
    slot.set_data(from[item.key()].detach().clone());
  }
  ASSERT_EQ(made->binding(), nullptr);
  PipelineLoadOptions options;
  options.components["transformer"] = Component(made);
  auto second = load(options);
  offload::EngineOptions engine;
  engine.weights_memory_bytes = 256 << 10;
  engine.small_slot_bytes = 0;
  second->enable_group_offload(std::make_shared<offload::Engine>(engine));
  for (const auto& item : made->named_parameters())
    EXPECT_TRUE(weights::is_stub(item.value())) << item.key();
  EXPECT_TRUE(at::equal((*second)(small()).tensor, expected));
  second->disable_group_offload();
  EXPECT_TRUE(at::equal((*second)(small()).tensor, expected));
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
