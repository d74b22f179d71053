// What the models do beyond their forward: loading, saving, errors, backends, fusing, tiling.
#include "ferry/models/model.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
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

// What testing/model_suites.h cannot know: a backend by its long name, and a processor of one's
// own.
TEST(Flux, ABackendByItsFullName) {
  at::NoGradGuard no_grad;
  auto model = load<FluxTransformer2DModel>("FluxTransformer2DModel-0");
  NamedTensors inputs = inputs_of("FluxTransformer2DModel-0");
  at::Tensor expected = model->forward_named("forward", inputs, {})["sample"];
  model->set_attention_backend("_native_flash");
  EXPECT_LT(relative_error(model->forward_named("forward", inputs, {})["sample"], expected), 1e-5);
  EXPECT_THAT(message_of<ArgumentError>([&] { model->set_attention_backend("xformers"); }),
              HasSubstr("xformers"));
}

TEST(Flux, AProcessorOfOnesOwnIsUsed) {
  struct Doubled : FluxAttnProcessor {
    mutable int calls = 0;
    std::string name() const override { return "Doubled"; }
    FluxAttentionOutput run(FluxAttention& attn, const at::Tensor& hidden_states,
                            const at::Tensor& encoder_hidden_states,
                            const at::Tensor& attention_mask,
                            const nn::RotaryEmbedding* image_rotary_emb) const override {
      ++calls;
      auto out = FluxAttnProcessor::run(attn, hidden_states, encoder_hidden_states, attention_mask,
                                        image_rotary_emb);
      return {out.hidden_states * 2, out.encoder_hidden_states};
    }
  };
  at::NoGradGuard no_grad;
  auto model = load<FluxTransformer2DModel>("FluxTransformer2DModel-0");
  NamedTensors inputs = inputs_of("FluxTransformer2DModel-0");
  at::Tensor expected = model->forward_named("forward", inputs, {})["sample"];
  auto doubled = std::make_shared<Doubled>();
  auto& attention = (*model->transformer_blocks)[0]->attn;
  attention->set_processor(doubled);
  EXPECT_EQ(model->attn_processors().at("transformer_blocks.0.attn"), "Doubled");
  EXPECT_GT(relative_error(model->forward_named("forward", inputs, {})["sample"], expected), 1e-3);
  EXPECT_EQ(doubled->calls, 1);
  model->set_attn_processor("FluxAttnProcessor");
  EXPECT_TRUE(at::equal(model->forward_named("forward", inputs, {})["sample"], expected));
  EXPECT_THROW(attention->set_processor(std::shared_ptr<FluxAttnProcessor>()), ArgumentError);
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

// Sizes that a damaged file may hold: an error that names the file and the key, at once.
TEST(Config, SizesThatNoModelHasAreRefused) {
  struct Case {
    const char* model;
    nlohmann::ordered_json config;
    const char* key;
  };
  const int64_t huge = int64_t{1} << 40, most = INT64_MAX;
  for (const Case& c : std::vector<Case>{
           {"FluxTransformer2DModel", {{"num_layers", huge}}, "num_layers"},
           {"FluxTransformer2DModel", {{"num_single_layers", most}}, "num_single_layers"},
           {"FluxTransformer2DModel", {{"patch_size", most}}, "patch_size"},
           {"FluxTransformer2DModel", {{"in_channels", -1}}, "in_channels"},
           {"FluxTransformer2DModel",
            {{"num_attention_heads", 1 << 20}, {"attention_head_dim", 1 << 20}},
            "num_attention_heads * attention_head_dim"},
           {"FluxTransformer2DModel", {{"axes_dims_rope", {-16, 56, 88}}}, "axes_dims_rope"},
           {"FluxTransformer2DModel", {{"axes_dims_rope", {15, 57, 56}}}, "even"},
           {"AutoencoderKL", {{"layers_per_block", huge}}, "layers_per_block"},
           {"AutoencoderKL", {{"latent_channels", most}}, "latent_channels"},
           {"AutoencoderKL", {{"block_out_channels", {most}}}, "block_out_channels"},
           {"AutoencoderKL", {{"sample_size", uint64_t{1} << 63}}, "sample_size"},
           {"CLIPTextModel", {{"num_hidden_layers", huge}}, "num_hidden_layers"},
           {"CLIPTextModel", {{"vocab_size", most}}, "vocab_size"},
           {"CLIPTextModel", {{"num_attention_heads", 0}}, "num_attention_heads"},
           {"CLIPTextModel", {{"max_position_embeddings", -77}}, "max_position_embeddings"},
           {"CLIPTextModelWithProjection", {{"projection_dim", most}}, "projection_dim"},
           {"T5EncoderModel", {{"num_layers", huge}}, "num_layers"},
           {"T5EncoderModel", {{"num_heads", 1 << 20}, {"d_kv", 1 << 20}}, "num_heads * d_kv"},
           {"T5EncoderModel", {{"d_ff", -5}}, "d_ff"},
           {"T5EncoderModel", {{"relative_attention_num_buckets", 0}}, "num_buckets"},
           {"T5EncoderModel", {{"relative_attention_max_distance", 1}}, "max_distance"}}) {
    EXPECT_THAT(message_of<ArgumentError>([&] { make_model(c.model, c.config, "here.json"); }),
                ::testing::AllOf(HasSubstr("here.json"),
                                 HasSubstr(c.model == std::string("CLIPTextModelWithProjection")
                                               ? "CLIPTextModel"
                                               : c.model),
                                 HasSubstr(c.key)))
        << c.config;
  }
}

TEST(Config, ValuesOfAWrongTypeAreRefused) {
  auto refused = [](const nlohmann::ordered_json& config) {
    return message_of<FormatError>([&] { make_model("AutoencoderKL", config, "here.json"); });
  };
  EXPECT_THAT(refused({{"latent_channels", 4.5}}), HasSubstr("\"latent_channels\": got 4.5"));
  EXPECT_THAT(refused({{"latent_channels", true}}), HasSubstr("whole number"));
  EXPECT_THAT(refused({{"latent_channels", 1e300}}), HasSubstr("whole number"));
  EXPECT_THAT(refused({{"latent_channels", UINT64_MAX}}), HasSubstr("whole number"));
  EXPECT_THAT(refused({{"latent_channels", nullptr}}), HasSubstr("null"));
  EXPECT_THAT(refused({{"block_out_channels", 32}}), HasSubstr("expected a list, got number"));
  EXPECT_THAT(refused({{"block_out_channels", {32, "x"}}}), HasSubstr("block_out_channels"));
  EXPECT_THAT(refused({{"act_fn", 7}}), HasSubstr("act_fn"));
  // Python writes whole numbers as 4.0 now and then.
  EXPECT_NO_THROW(
      make_model("AutoencoderKL", {{"block_out_channels", {32}}, {"latent_channels", 4.0}}));
}

TEST(Config, AFilesErrorIsTheFilesFault) {
  TempFolder folder;
  fs::create_directories(folder.path);
  std::ofstream(folder.path / "config.json")
      << R"({"_class_name": "AutoencoderKL", "latent_channels": -4})";
  EXPECT_THAT(message_of<FormatError>([&] { load_model(folder.path); }),
              ::testing::AllOf(HasSubstr("config.json"), HasSubstr("latent_channels: got -4")));
}

TEST(Config, KeepsTheOrderOfItsFile) {
  nlohmann::ordered_json config = {{"up_block_types", {"UpDecoderBlock2D"}},
                                   {"of_the_future", 1},
                                   {"block_out_channels", {32}},
                                   {"_class_name", "AutoencoderKL"}};
  auto keys = make_model("AutoencoderKL", config)->config_json();
  ASSERT_GT(keys.size(), 4u);
  auto key = keys.begin();
  for (const char* expected :
       {"up_block_types", "of_the_future", "block_out_channels", "_class_name"}) {
    EXPECT_EQ(key.key(), expected);
    ++key;
  }
}

TEST(Load, StopsBetweenTensorsAndGoesOnLater) {
  at::NoGradGuard no_grad;
  auto vae = load<AutoencoderKL>("AutoencoderKL-0");
  StopSource stop;
  stop.request_stop();
  EXPECT_THROW(vae->load_weights(stop.token()), Cancelled);
  EXPECT_FALSE(vae->weights_loaded());
  vae->set_load_stop(stop.token());
  EXPECT_THROW(vae->decode(inputs_of("AutoencoderKL-1")["z"]), Cancelled);
  vae->set_load_stop({});
  vae->decode(inputs_of("AutoencoderKL-1")["z"]);
  EXPECT_TRUE(vae->weights_loaded());
}

TEST(Registry, KeepsUnknownKeysOfAConfig) {
  nlohmann::ordered_json config = {{"block_out_channels", {32}}, {"of_the_future", {1, 2}}};
  EXPECT_EQ(make_model("AutoencoderKL", config)->config_json()["of_the_future"],
            config["of_the_future"]);
}

}  // namespace
}  // namespace ferry::models
