// What the models do beyond their forward: loading, saving, errors, backends, fusing, tiling.
#include "ferry/models/model.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <functional>

#include "../fixture_tensors.h"
#include "ferry/base/error.h"
#include "ferry/models/autoencoders/autoencoder_kl.h"
#include "ferry/models/transformers/transformer_flux.h"
#include "ferry/weights/slot.h"

namespace ferry::models {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using testing::relative_error;

const fs::path kModels = FERRY_FIXTURES "/models";

NamedTensors inputs_of(const std::string& fixture) {
  return testing::read_fixture_tensors((kModels / fixture / "inputs.safetensors").string());
}

template <class M>
std::shared_ptr<M> load(const std::string& fixture, const LoadOptions& options = {}) {
  return std::dynamic_pointer_cast<M>(load_model(kModels / fixture, options));
}

template <class E>
std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const E& error) {
    return error.what();
  }
  return "nothing was thrown";
}

struct TempFolder {
  fs::path path = fs::temp_directory_path() / ("ferry_model_test_" + std::to_string(getpid()));
  ~TempFolder() { fs::remove_all(path); }
  std::vector<std::string> files() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(path))
      names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
  }
};

TEST(Flux, BackendsAndFusedProjectionsGiveTheSame) {
  at::NoGradGuard no_grad;
  auto model = load<FluxTransformer2DModel>("FluxTransformer2DModel-0");
  NamedTensors inputs = inputs_of("FluxTransformer2DModel-0");
  at::Tensor expected = model->forward_named("forward", inputs, {})["sample"];
  for (const char* backend : {"math", "_native_flash", "native"}) {
    model->set_attention_backend(backend);
    EXPECT_LT(relative_error(model->forward_named("forward", inputs, {})["sample"], expected), 1e-5)
        << backend;
  }
  EXPECT_THAT(message_of<ArgumentError>([&] { model->set_attention_backend("xformers"); }),
              HasSubstr("xformers"));

  size_t slots = weights::collect_slots(*model).size();
  model->fuse_qkv_projections();
  EXPECT_GT(weights::collect_slots(*model).size(), slots);
  EXPECT_LT(relative_error(model->forward_named("forward", inputs, {})["sample"], expected), 1e-5);
  model->unfuse_qkv_projections();
  EXPECT_EQ(weights::collect_slots(*model).size(), slots);
  EXPECT_TRUE(at::equal(model->forward_named("forward", inputs, {})["sample"], expected));
}

TEST(Flux, FusingNeedsWeights) {
  auto model = load<FluxTransformer2DModel>("FluxTransformer2DModel-0");
  EXPECT_THAT(message_of<ArgumentError>([&] { model->fuse_qkv_projections(); }),
              HasSubstr("load_weights()"));
}

TEST(Flux, ControlnetResidualsReachTheirBlocks) {
  at::NoGradGuard no_grad;
  auto model =
      load<FluxTransformer2DModel>("FluxTransformer2DModel-1");  // 2 double blocks, 1 single
  NamedTensors inputs = inputs_of("FluxTransformer2DModel-1");
  at::Tensor plain = model->forward_named("forward", inputs, {})["sample"];
  at::Tensor zero = at::zeros({1, 16, 16}), one = at::ones({1, 16, 16});
  auto run = [&](NamedTensors residuals, const nlohmann::json& arguments = {}) {
    residuals.insert(inputs.begin(), inputs.end());
    return model->forward_named("forward", residuals, arguments)["sample"];
  };
  EXPECT_TRUE(at::equal(run({{"controlnet_block_samples.0", zero}}), plain));
  // One residual serves both blocks; two serve one each, in either counting.
  at::Tensor both = run({{"controlnet_block_samples.0", one}});
  EXPECT_FALSE(at::equal(both, plain));
  NamedTensors pair{{"controlnet_block_samples.0", one}, {"controlnet_block_samples.1", one}};
  EXPECT_TRUE(at::equal(run(pair), both));
  EXPECT_TRUE(at::equal(run(pair, {{"controlnet_blocks_repeat", true}}), both));
  EXPECT_FALSE(at::equal(run({{"controlnet_single_block_samples.0", one}}), plain));
}

TEST(Flux, ArgumentErrorsNameWhatIsExpected) {
  auto model = load<FluxTransformer2DModel>("FluxTransformer2DModel-0");
  NamedTensors inputs = inputs_of("FluxTransformer2DModel-0");
  inputs.erase("img_ids");
  inputs["images"] = at::zeros({1});
  std::string message = message_of<ArgumentError>([&] {
    model->forward_named("forward", inputs, {{"scale", 1}});
  });
  EXPECT_THAT(message, HasSubstr("missing inputs [img_ids]"));
  EXPECT_THAT(message, HasSubstr("images"));
  EXPECT_THAT(message, HasSubstr("scale"));
  inputs = inputs_of("FluxTransformer2DModel-0");
  inputs.erase("guidance");
  EXPECT_THAT(message_of<ArgumentError>([&] { model->forward_named("forward", inputs, {}); }),
              HasSubstr("guidance"));
  EXPECT_THAT(message_of<ArgumentError>([&] { model->forward_named("encode", inputs, {}); }),
              HasSubstr("forward"));
}

TEST(Flux, ConfigsThatCannotBe) {
  auto with = [](const nlohmann::ordered_json& config) {
    make_model("FluxTransformer2DModel", config, "here");
  };
  EXPECT_THAT(message_of<ArgumentError>([&] {
                with({{"axes_dims_rope", {16, 16}}});
              }),
              HasSubstr("axes_dims_rope"));
  EXPECT_THAT(message_of<ArgumentError>([&] {
                with({{"num_layers", -1}});
              }),
              HasSubstr("num_layers"));
  EXPECT_THAT(message_of<FormatError>([&] {
                with({{"num_layers", "many"}});
              }),
              HasSubstr("here: key \"num_layers\""));
  EXPECT_THAT(message_of<ArgumentError>([] { make_model("FluxTransformer3DModel", {}, "here"); }),
              HasSubstr("FluxTransformer2DModel"));
}

TEST(Flux, TheFullModelIsMadeWithoutMemory) {
  auto model = make_model("FluxTransformer2DModel", {{"guidance_embeds", true}});
  EXPECT_EQ(weights::collect_slots(*model).size(), 1160);  // as many as FLUX.1-dev's checkpoint has
  EXPECT_EQ(weights::total_bytes(weights::collect_slots(*model)), 4ull * 11'901'408'320);
  EXPECT_FALSE(model->weights_loaded());
}

TEST(Autoencoder, TilesBlendAsInPython) {
  at::NoGradGuard no_grad;
  auto reference =
      testing::read_fixture_tensors(FERRY_FIXTURES "/nn/autoencoder_tiling.safetensors");
  auto vae = load<AutoencoderKL>("AutoencoderKL-0");
  vae->enable_tiling({.tile_sample_min_size = 16, .tile_latent_min_size = 8});
  EXPECT_LT(
      relative_error(vae->encode(reference["encode.in.sample"]).mean(), reference["encode.out"]),
      1e-5);
  EXPECT_LT(relative_error(vae->decode(reference["decode.in.z"]), reference["decode.out"]), 1e-5);
  vae->enable_slicing();
  EXPECT_LT(relative_error(vae->decode(reference["decode.in.z"]), reference["decode.out"]), 1e-5);
  vae->disable_tiling();
  EXPECT_GT(relative_error(vae->decode(reference["decode.in.z"]), reference["decode.out"]), 1e-3);
  vae->disable_slicing();
  at::Tensor small = reference["forward.in.sample"];
  EXPECT_LT(relative_error(vae->forward_named("forward", {{"sample", small}}, {})["sample"],
                           reference["forward.out"]),
            1e-5);
  tensor::Generator generator;
  generator.manual_seed(3);
  EXPECT_LT(relative_error(vae->encode(small).sample({generator}), reference["sample.out"]), 1e-5);
  EXPECT_THROW(vae->enable_tiling({.tile_sample_min_size = 0}), ArgumentError);
  EXPECT_THROW(
      vae->enable_tiling(
          {.tile_sample_min_size = 16, .tile_latent_min_size = 8, .tile_overlap_factor = 1.0}),
      ArgumentError);
}

TEST(Autoencoder, FusedProjections) {
  at::NoGradGuard no_grad;
  auto vae = load<AutoencoderKL>("AutoencoderKL-1");
  at::Tensor z = inputs_of("AutoencoderKL-1")["z"], expected = vae->decode(z);
  vae->fuse_qkv_projections();
  EXPECT_LT(relative_error(vae->decode(z), expected), 1e-5);
}

TEST(Autoencoder, HooksRunAroundEncodeAndDecode) {
  struct Counter : nn::ModuleHook {
    int before_count = 0, after_count = 0;
    void before(nn::Module&) override { ++before_count; }
    void after(nn::Module&) override { ++after_count; }
  };
  at::NoGradGuard no_grad;
  auto vae = load<AutoencoderKL>("AutoencoderKL-0");
  auto counter = std::make_shared<Counter>();
  vae->add_hook("counter", counter);
  vae->encode(inputs_of("AutoencoderKL-0")["sample"]);
  EXPECT_EQ(counter->before_count, 1);
  vae->decode(inputs_of("AutoencoderKL-1")["z"]);
  vae->forward_named("forward", inputs_of("AutoencoderKL-0"), {});
  EXPECT_EQ(counter->before_count, 3);
  EXPECT_EQ(counter->after_count, 3);
}

TEST(Autoencoder, OldNamesOfAttentionLayers) {
  auto vae = make_model("AutoencoderKL", {{"block_out_channels", {32}}});
  const std::string prefix = "encoder.mid_block.attentions.0.";
  EXPECT_EQ(vae->map_key(prefix + "query.weight"), prefix + "to_q.weight");
  EXPECT_EQ(vae->map_key(prefix + "proj_attn.bias"), prefix + "to_out.0.bias");
  EXPECT_EQ(vae->map_key(prefix + "group_norm.bias"), prefix + "group_norm.bias");
  EXPECT_EQ(vae->map_key("quant_conv.bias"), "quant_conv.bias");
}

TEST(Autoencoder, ConfigsThatCannotBe) {
  auto with = [](const nlohmann::ordered_json& config) {
    make_model("AutoencoderKL", config, "here");
  };
  EXPECT_THAT(message_of<ArgumentError>([&] {
                with({{"down_block_types", {"AttnDownEncoderBlock2D"}}});
              }),
              HasSubstr("AttnDownEncoderBlock2D"));
  EXPECT_THAT(message_of<ArgumentError>([&] {
                with({{"block_out_channels", {32, 64}}});
              }),
              HasSubstr("block_out_channels"));
  EXPECT_THAT(message_of<ArgumentError>([&] {
                with({{"block_out_channels", {33}}});
              }),
              HasSubstr("groups"));
  EXPECT_THAT(message_of<ArgumentError>([&] {
                with({{"sample_size", "big"}});
              }),
              HasSubstr("sample_size"));
}

TEST(Save, ShardsAndTheirNames) {
  at::NoGradGuard no_grad;
  TempFolder folder;
  auto vae =
      load<AutoencoderKL>("AutoencoderKL-0", {.dtype = at::kHalf, .variant = "", .load_now = true});
  vae->save_pretrained(folder.path, 4000, "fp16");
  std::vector<std::string> files = folder.files();
  EXPECT_THAT(files, ::testing::Contains("diffusion_pytorch_model.safetensors.index.fp16.json"));
  EXPECT_THAT(files, ::testing::Contains(::testing::MatchesRegex(
                         "diffusion_pytorch_model.fp16-00001-of-0000[0-9].safetensors")));
  auto again = load_model(folder.path, {.dtype = {}, .variant = "fp16"});
  EXPECT_EQ(again->dtype(), at::kHalf);
  // In one file, over the former save: the shards and their index are gone.
  again->save_pretrained(folder.path, 1 << 30, "fp16");
  EXPECT_THAT(folder.files(),
              ::testing::ElementsAre("config.json", "diffusion_pytorch_model.fp16.safetensors"));
  load_model(folder.path, {.dtype = {}, .variant = "fp16", .load_now = true});
}

TEST(Save, RefusesAModelWithoutWeights) {
  TempFolder folder;
  auto vae = make_model("AutoencoderKL", {{"block_out_channels", {32}}});
  EXPECT_THAT(message_of<ArgumentError>([&] { vae->save_pretrained(folder.path); }),
              HasSubstr("has no weight"));
  EXPECT_TRUE(folder.files().empty());
}

TEST(Registry, KeepsUnknownKeysOfAConfig) {
  nlohmann::ordered_json config = {{"block_out_channels", {32}}, {"of_the_future", {1, 2}}};
  EXPECT_EQ(make_model("AutoencoderKL", config)->config_json()["of_the_future"],
            config["of_the_future"]);
}

}  // namespace
}  // namespace ferry::models
