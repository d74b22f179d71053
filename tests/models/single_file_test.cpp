#include "ferry/models/single_file.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "../fixture_tensors.h"
#include "../io/temp_folder.h"
#include "ferry/base/error.h"
#include "ferry/io/checksum.h"
#include "ferry/models/text_encoders/clip_text_model.h"
#include "ferry/models/transformers/transformer_flux.h"
#include "ferry/nn/linear.h"
#include "ferry/weights/binding.h"

namespace ferry::models {
namespace {

using namespace ferry::testing_io;
using nlohmann::ordered_json;
using ::testing::HasSubstr;

std::filesystem::path file(const std::string& name) {
  return std::string(FERRY_FIXTURES) + "/quant/single_file/" + name;
}

ordered_json json(const std::string& name) {
  return ferry::testing::read_fixture_json(file(name));
}

std::string digest(const at::Tensor& tensor) {
  at::Tensor bytes = tensor.contiguous();
  return io::sha256_hex({static_cast<const std::byte*>(bytes.const_data_ptr()), bytes.nbytes()});
}

// What Python's converter returned for one parameter: shape, type, SHA-256 of the bytes.
void expect_same(const ordered_json& expected, const std::string& name, const at::Tensor& got,
                 std::string_view type) {
  ASSERT_TRUE(expected.contains(name)) << name;
  const ordered_json& entry = expected[name];
  EXPECT_EQ(got.sizes(), at::IntArrayRef(entry["shape"].get<std::vector<int64_t>>())) << name;
  EXPECT_EQ(type, entry["type"].get<std::string>()) << name;
  EXPECT_EQ(digest(got), entry["sha256"].get<std::string>()) << name;
}

// Every parameter under its name, the bytes as they are stored.
void expect_as_converted(const SingleFile& single, const ordered_json& expected) {
  EXPECT_EQ(single.weights.plain.size() + single.weights.quantized.size(), expected.size());
  for (const weights::StoredTensor& stored : single.weights.plain)
    expect_same(expected, stored.key, weights::read_stored(stored), io::name(stored.dtype));
  for (const auto& [name, quantized] : single.weights.quantized) {
    std::string type(quantized.weight->scheme().substr(std::string_view("GGUF ").size()));
    expect_same(expected, name, weights::read_stored(quantized.components[0]), type);
  }
}

TEST(SingleFile, FluxOfBlackForestLabsAsDiffusersConvertsIt) {
  SingleFile single = open_single_file(file("flux_bfl.safetensors"));
  EXPECT_EQ(single.class_name, "FluxTransformer2DModel");
  EXPECT_THAT(single.key_map, HasSubstr("Black Forest Labs"));
  EXPECT_FALSE(single.is_gguf);
  expect_as_converted(single, json("flux_bfl.json"));
  // Rows are ranges of the file; only the swapped halves are anything else.
  int encoded = 0;
  for (const weights::StoredTensor& stored : single.weights.plain) encoded += !!stored.encoding;
  EXPECT_EQ(encoded, 2);
  EXPECT_EQ(single.config["num_layers"], 1);
  EXPECT_EQ(single.config["num_single_layers"], 2);
  EXPECT_EQ(single.config["attention_head_dim"], 8);
  EXPECT_EQ(single.config["num_attention_heads"], 2);
  EXPECT_EQ(single.config["guidance_embeds"], true);
  EXPECT_EQ(single.config["in_channels"], 16);
  EXPECT_EQ(single.config["out_channels"], nullptr);
  EXPECT_EQ(single.config["joint_attention_dim"], 32);
  EXPECT_EQ(single.config["pooled_projection_dim"], 32);
}

TEST(SingleFile, FluxOfGgufAsDiffusersConvertsIt) {
  SingleFile single = open_single_file(file("flux_bfl.gguf"));
  EXPECT_EQ(single.class_name, "FluxTransformer2DModel");
  EXPECT_TRUE(single.is_gguf);
  expect_as_converted(single, json("flux_bfl_gguf.json"));
  EXPECT_GT(single.weights.quantized.size(), 30u);
  EXPECT_EQ(single.config["guidance_embeds"], false);
  EXPECT_EQ(single.config["num_layers"], 2);
  EXPECT_EQ(single.config["num_single_layers"], 1);
}

const ordered_json kFluxConfig = {{"axes_dims_rope", {8, 4, 4}}};

NamedTensors flux_inputs(const std::map<std::string, at::Tensor>& fixture, at::ScalarType dtype) {
  NamedTensors inputs;
  for (const auto& [name, tensor] : fixture) {
    if (!name.starts_with("input.")) continue;
    std::string argument = name.substr(std::string_view("input.").size());
    inputs[argument] = argument.ends_with("_ids") ? tensor : tensor.to(dtype);
  }
  return inputs;
}

// diffusers' model with the values that the gguf package dequantizes.
TEST(SingleFile, FluxOfGgufRunsAsDiffusers) {
  c10::InferenceMode guard;
  auto fixture = ferry::testing::read_fixture_tensors(file("flux_forward.safetensors"));
  LoadOptions options;
  options.dtype = at::kFloat;
  auto model = load_single_file(file("flux_bfl.gguf"), options, "", kFluxConfig);
  NamedTensors outputs = model->forward_named("forward", flux_inputs(fixture, at::kFloat), {});
  EXPECT_LT(ferry::testing::relative_error(outputs.at("sample"), fixture.at("expected")), 1e-5);

  // Unset, the dtype is bfloat16, also of what the file has as float32; blocks stay blocks.
  auto half = load_single_file(file("flux_bfl.gguf"), {}, "", kFluxConfig);
  EXPECT_EQ(half->dtype(), at::kBFloat16);
  auto& flux = dynamic_cast<FluxTransformer2DModel&>(*half);
  EXPECT_EQ(flux.context_embedder->bias.scalar_type(), at::kBFloat16);
  ASSERT_NE(flux.context_embedder->quantized_weight(), nullptr);
  EXPECT_EQ(flux.context_embedder->components()[0].scalar_type(), at::kByte);
  EXPECT_TRUE(flux.x_embedder->weight.defined());
  outputs = half->forward_named("forward", flux_inputs(fixture, at::kBFloat16), {});
  EXPECT_LT(ferry::testing::relative_error(outputs.at("sample"), fixture.at("expected")), 0.03);
}

TEST(SingleFile, AutoencoderAsDiffusersConvertsIt) {
  SingleFile single = open_single_file(file("ae_ldm.safetensors"));
  EXPECT_EQ(single.class_name, "AutoencoderKL");
  expect_as_converted(single, json("ae_ldm.json"));
  EXPECT_EQ(single.config["block_out_channels"], ordered_json({4, 8, 8}));
  EXPECT_EQ(single.config["layers_per_block"], 2);
  EXPECT_EQ(single.config["latent_channels"], 16);
  EXPECT_EQ(single.config["scaling_factor"], 0.3611);
  EXPECT_EQ(single.config["shift_factor"], 0.1159);
  EXPECT_EQ(single.config["use_quant_conv"], false);
  EXPECT_EQ(single.config["mid_block_add_attention"], true);
  auto model = load_single_file(file("ae_ldm.safetensors"), {}, "", {{"norm_num_groups", 2}});
  EXPECT_EQ(model->dtype(), at::kHalf);
  model->load_weights();
}

// Names and values as transformers' GGUF loader has them.
TEST(SingleFile, T5OfLlamaCppAsTransformersLoadsIt) {
  SingleFile single = open_single_file(file("t5.gguf"));
  EXPECT_EQ(single.class_name, "T5EncoderModel");
  const ordered_json expected = json("t5.json");
  size_t compared = 0;
  auto compare = [&](const std::string& name, const at::Tensor& values) {
    // Python names the table by either of its two names.
    std::string known = expected.contains(name) ? name : "encoder.embed_tokens.weight";
    expect_same(expected, known, values, "F32");
    ++compared;
  };
  for (const weights::StoredTensor& stored : single.weights.plain)
    compare(stored.key, weights::read_stored(stored).to(at::kFloat));
  for (const auto& [name, quantized] : single.weights.quantized) {
    std::vector<at::Tensor> blocks{weights::read_stored(quantized.components[0])};
    compare(name, quantized.weight->dequantize(blocks, at::kFloat));
  }
  EXPECT_EQ(compared, 21u);
  EXPECT_EQ(single.config["d_model"], 32);
  EXPECT_EQ(single.config["d_kv"], 16);
  EXPECT_EQ(single.config["d_ff"], 64);
  EXPECT_EQ(single.config["num_heads"], 2);
  EXPECT_EQ(single.config["num_layers"], 2);
  EXPECT_EQ(single.config["vocab_size"], 64);
  EXPECT_EQ(single.config["relative_attention_num_buckets"], 32);
  EXPECT_EQ(single.config["feed_forward_proj"], "gated-gelu");
  EXPECT_EQ(single.config["layer_norm_epsilon"], 1e-5);
  EXPECT_EQ(io::find_value(single.gguf, "tokenizer.ggml.tokens")->as_strings()->size(), 64u);

  // The table of blocks is read as bfloat16; the linear layers keep theirs.
  auto model = load_single_file(file("t5.gguf"));
  model->load_weights();
  EXPECT_EQ(model->named_parameters()["shared.weight"].scalar_type(), at::kBFloat16);
  EXPECT_TRUE(
      model->named_buffers().contains("encoder.block.1.layer.1.DenseReluDense.wo.weight_blocks"));
}

// Weights of older published folders, without their config.json.
TEST(SingleFile, TextEncodersUnderTheirOwnNames) {
  const std::string models = std::string(FERRY_FIXTURES) + "/models/";
  SingleFile clip = open_single_file(models + "CLIPTextModel-1/model.safetensors");
  EXPECT_EQ(clip.class_name, "CLIPTextModel");
  EXPECT_EQ(clip.config["hidden_size"], 24);
  EXPECT_EQ(clip.config["intermediate_size"], 48);
  EXPECT_EQ(clip.config["num_hidden_layers"], 2);
  EXPECT_EQ(clip.config["max_position_embeddings"], 16);
  EXPECT_EQ(clip.config["hidden_act"], "quick_gelu");
  auto model = load_single_file(models + "CLIPTextModel-1/model.safetensors", {}, "",
                                {{"num_attention_heads", 3}});
  model->load_weights();
  EXPECT_NE(dynamic_cast<CLIPTextModel*>(model.get()), nullptr);

  SingleFile projected = open_single_file(
      models + "CLIPTextModelWithProjection-1/model.safetensors", "CLIPTextModelWithProjection");
  EXPECT_EQ(projected.class_name, "CLIPTextModelWithProjection");
  EXPECT_EQ(projected.config["projection_dim"], 16);

  SingleFile t5 = open_single_file(models + "T5EncoderModel-1/model.safetensors");
  ordered_json config = ferry::testing::read_fixture_json(models + "T5EncoderModel-1/config.json");
  for (const char* key : {"d_ff", "d_kv", "d_model", "num_heads", "num_layers", "vocab_size",
                          "relative_attention_num_buckets", "feed_forward_proj"}) {
    EXPECT_EQ(t5.config[key], config[key]) << key;
  }
}

// The folder that diffusers writes holds a file that is complete with its config.
TEST(SingleFile, DiffusersNamesStayAsTheyAre) {
  for (std::string name : {"FluxTransformer2DModel-0", "AutoencoderKL-0"}) {
    const std::string folder = std::string(FERRY_FIXTURES) + "/models/" + name;
    SingleFile single = open_single_file(folder + "/diffusion_pytorch_model.safetensors");
    ordered_json config = ferry::testing::read_fixture_json(folder + "/config.json");
    EXPECT_EQ(single.class_name, config["_class_name"]);
    EXPECT_TRUE(single.weights.quantized.empty());
    for (const char* key : {"in_channels", "num_layers", "num_single_layers", "guidance_embeds",
                            "block_out_channels", "use_quant_conv", "layers_per_block"}) {
      if (!config.contains(key)) continue;
      EXPECT_EQ(single.config[key], config[key]) << key;
    }
  }
}

TEST(SingleFile, SaysWhatItCannotTake) {
  TempFolder folder;
  auto write = [&](std::vector<io::GgufWriter::Entry> entries) {
    io::GgufWriter writer(folder / "a.gguf", entries);
    for (const auto& entry : entries) {
      int64_t elements = 1;
      for (int64_t extent : entry.shape) elements *= extent;
      writer.write(std::vector<std::byte>(static_cast<size_t>(elements * 4)));
    }
    writer.finish();
  };
  auto error = [&](const std::string& class_name = "") {
    return error_of<FormatError>([&] { open_single_file(folder / "a.gguf", class_name); });
  };
  write({{"blk.0.attn_q.weight", io::GgmlType::F32, {2, 2}}});
  EXPECT_THAT(error(), ::testing::AllOf(HasSubstr("a.gguf"), HasSubstr("blk.0.attn_q.weight"),
                                        HasSubstr("T5, llama.cpp's names")));
  const std::string qkv = "double_blocks.0.img_attn.qkv.weight";
  write({{"img_in.weight", io::GgmlType::F32, {4, 4}}, {qkv, io::GgmlType::F32, {13, 4}}});
  EXPECT_THAT(error(), HasSubstr("'" + qkv + "' has 13 rows, expected a multiple of 3"));
  EXPECT_THAT(error("AutoencoderKL"), HasSubstr("holds no AutoencoderKL, but Flux"));
  write({{"img_in.weight", io::GgmlType::F32, {4, 4}},
         {qkv, io::GgmlType::F32, {12, 4}},
         {"single_blocks.0.linear1.weight", io::GgmlType::F32, {12, 4}}});
  EXPECT_THAT(error(), HasSubstr("has 12 rows, expected more than three times 4"));
  write({{"img_in.weight", io::GgmlType::F32, {4, 4}},
         {qkv, io::GgmlType::F32, {12, 4}},
         {"final_layer.adaLN_modulation.1.bias", io::GgmlType::F32, {3}}});
  EXPECT_THAT(error(), HasSubstr("expected an even number of rows"));

  // What the model lacks is told all at once, with the file's name.
  LoadOptions options;
  options.variant = "fp16";
  EXPECT_THAT(error_of<ArgumentError>([&] { load_single_file(file("t5.gguf"), options); }),
              HasSubstr("has no variant"));
  EXPECT_THAT(error_of<FormatError>([&] { load_single_file(file("flux_bfl.gguf")); }),
              HasSubstr("axes_dims_rope"));
}

}  // namespace
}  // namespace ferry::models
