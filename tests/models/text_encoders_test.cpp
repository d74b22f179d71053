#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "../fixture_tensors.h"
#include "ferry/base/error.h"
#include "ferry/models/text_encoders/clip_text_model.h"
#include "ferry/models/text_encoders/t5_encoder_model.h"
#include "ferry/weights/slot.h"

namespace ferry::models {
namespace {

using ferry::testing::read_fixture_json;
using ferry::testing::read_fixture_tensors;
using ferry::testing::relative_error;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

std::string fixture(const std::string& name) {
  return FERRY_FIXTURES "/models/" + name;
}

// A model with a fixture's weights, put there without the loader.
template <class M>
nn::Ptr<M> load(const std::string& name,
                const nlohmann::ordered_json& changes = nlohmann::ordered_json::object()) {
  nlohmann::ordered_json config = read_fixture_json(fixture(name) + "/config.json");
  config.update(changes);
  auto model = nn::make<M>(config_from_json<typename M::Config>(config, name));
  std::map<std::string, at::Tensor> weights;
  for (const auto& [key, tensor] : read_fixture_tensors(fixture(name) + "/model.safetensors")) {
    weights[model->map_key(key)] = tensor;
  }
  for (weights::Slot& slot : weights::collect_slots(*model))
    slot.tensor.set_data(weights.at(slot.name()));
  return model;
}

double parity(const std::string& name, Model& model) {
  nlohmann::ordered_json call = read_fixture_json(fixture(name) + "/args.json");
  NamedTensors outputs =
      model.forward_named("forward", read_fixture_tensors(fixture(name) + "/inputs.safetensors"),
                          nlohmann::json::parse(call["args"].dump()));
  auto expected = read_fixture_tensors(fixture(name) + "/outputs.safetensors");
  EXPECT_EQ(outputs.size(), expected.size());
  double worst = 0.0;
  for (const auto& [key, tensor] : expected) {
    double error = outputs.contains(key) ? relative_error(outputs[key], tensor) : 1e30;
    EXPECT_LE(error, 1e-5) << name << " " << key;
    worst = std::max(worst, error);
  }
  return worst;
}

TEST(TextEncoders, EqualPython) {
  for (const char* name : {"CLIPTextModel-0", "CLIPTextModel-1"}) {
    RecordProperty(name, std::to_string(parity(name, *load<CLIPTextModel>(name))));
  }
  for (const char* name : {"CLIPTextModelWithProjection-0", "CLIPTextModelWithProjection-1"}) {
    RecordProperty(name, std::to_string(parity(name, *load<CLIPTextModelWithProjection>(name))));
  }
  for (const char* name : {"T5EncoderModel-0", "T5EncoderModel-1"}) {
    RecordProperty(name, std::to_string(parity(name, *load<T5EncoderModel>(name))));
  }
}

TEST(CLIPTextModel, PoolsAtTheFirstEndTokenOrTheHighestId) {
  auto model = load<CLIPTextModel>("CLIPTextModel-0", {{"eos_token_id", 40}});
  at::Tensor ids = at::tensor({7, 40, 99, 40}, at::kLong).unsqueeze(0);
  CLIPTextOutput output = model(ids);
  EXPECT_TRUE(at::equal(output.pooler_output[0], output.last_hidden_state[0][1]));
  auto legacy = load<CLIPTextModel>("CLIPTextModel-0", {{"eos_token_id", 2}});
  output = legacy(ids);
  EXPECT_TRUE(at::equal(output.pooler_output[0], output.last_hidden_state[0][2]));
}

TEST(CLIPTextModel, LaterTokensDoNotChangeEarlierStates) {
  auto model = load<CLIPTextModel>("CLIPTextModel-0");
  at::Tensor ids = at::tensor({5, 6, 7, 8}, at::kLong).unsqueeze(0), other = ids.clone();
  other[0][3] = 50;
  at::Tensor mask = at::ones({1, 4}, at::kLong);
  for (const at::Tensor& attention_mask : {at::Tensor(), mask}) {
    at::Tensor one = model(ids, attention_mask).last_hidden_state;
    at::Tensor two = model(other, attention_mask).last_hidden_state;
    EXPECT_LE((one - two).slice(1, 0, 3).abs().max().item<double>(), 1e-6);
    EXPECT_GT((one - two)[0][3].abs().max().item<double>(), 1e-3);
  }
  // A mask of ones changes nothing.
  EXPECT_LE(relative_error(model(ids, mask).last_hidden_state, model(ids).last_hidden_state), 1e-6);
}

TEST(CLIPTextModel, KeysOfEveryGeneration) {
  CLIPTextConfig config;
  config.num_hidden_layers = 1;
  CLIPTextModel model(config);
  EXPECT_EQ(model.map_key("text_model.encoder.layers.0.mlp.fc1.bias"),
            "encoder.layers.0.mlp.fc1.bias");
  EXPECT_EQ(model.map_key("encoder.layers.0.mlp.fc1.bias"), "encoder.layers.0.mlp.fc1.bias");
  for (const char* dropped :
       {"text_model.embeddings.position_ids", "embeddings.position_ids", "logit_scale",
        "text_projection.weight", "vision_model.embeddings.class_embedding"}) {
    EXPECT_EQ(model.map_key(dropped), "") << dropped;
  }
  CLIPTextModelWithProjection projection(config);
  EXPECT_EQ(projection.map_key("text_model.final_layer_norm.bias"),
            "text_model.final_layer_norm.bias");
  EXPECT_EQ(projection.map_key("final_layer_norm.bias"), "text_model.final_layer_norm.bias");
  EXPECT_EQ(projection.map_key("text_projection.weight"), "text_projection.weight");
  EXPECT_EQ(projection.map_key("text_model.embeddings.position_ids"), "");
}

TEST(CLIPTextModel, WrongUseIsNamed) {
  auto message = [](const std::string& text) {
    return ThrowsMessage<ArgumentError>(HasSubstr(text));
  };
  CLIPTextConfig config;
  config.hidden_size = 30;
  EXPECT_THAT([&] { CLIPTextModel model(config); }, message("hidden_size 30"));
  config = {};
  config.projection_dim.reset();
  EXPECT_THAT([&] { CLIPTextModelWithProjection model(config); }, message("projection_dim"));
  auto model = load<CLIPTextModel>("CLIPTextModel-1");  // 16 positions
  EXPECT_THAT(
      [&] {
        model(at::ones({1, 17}, at::kLong));
      },
      message("17 tokens, expected at most 16"));
  EXPECT_THAT(
      [&] {
        model(at::ones({1, 4}, at::kLong), at::ones({1, 5}, at::kLong));
      },
      message("attention_mask"));
  EXPECT_THAT([&] { model->forward_named("forward", {}, {}); }, message("input_ids"));
  EXPECT_THAT(
      [&] {
        model->forward_named("forward", {{"input_ids", at::ones({1, 4}, at::kLong)}},
                             {{"top_k", 1}});
      },
      message("top_k"));
}

TEST(T5EncoderModel, MaskedTokensDoNotMatter) {
  auto model = load<T5EncoderModel>("T5EncoderModel-0");
  at::Tensor ids = at::tensor({5, 6, 7, 0, 0}, at::kLong).unsqueeze(0), other = ids.clone();
  other[0][3] = 50;
  at::Tensor mask = at::tensor({1, 1, 1, 0, 0}, at::kLong).unsqueeze(0);
  at::Tensor one = model(ids, mask).last_hidden_state, two = model(other, mask).last_hidden_state;
  EXPECT_TRUE(at::equal(one.slice(1, 0, 3), two.slice(1, 0, 3)));
  EXPECT_FALSE(at::equal(model(ids).last_hidden_state.slice(1, 0, 3),
                         model(other).last_hidden_state.slice(1, 0, 3)));
  // Masked is as good as absent: positions are relative.
  EXPECT_LE(relative_error(one.slice(1, 0, 3), model(ids.slice(1, 0, 3)).last_hidden_state), 1e-5);
}

TEST(T5EncoderModel, EmbedsInPlaceOfIds) {
  auto model = load<T5EncoderModel>("T5EncoderModel-0");
  at::Tensor ids = at::tensor({5, 6, 7}, at::kLong).unsqueeze(0);
  at::Tensor embeds = model->shared(ids);
  EXPECT_TRUE(at::equal(model(at::Tensor(), at::Tensor(), embeds).last_hidden_state,
                        model(ids).last_hidden_state));
  EXPECT_THAT([&] { model(ids, at::Tensor(), embeds); },
              ThrowsMessage<ArgumentError>(HasSubstr("both")));
}

TEST(T5EncoderModel, OutputProjectionMayStayFloat32AmongHalves) {
  auto reference = load<T5EncoderModel>("T5EncoderModel-0"),
       model = load<T5EncoderModel>("T5EncoderModel-0");
  for (weights::Slot& slot : weights::collect_slots(*model)) {
    if (slot.name().find(".wo.") == std::string::npos)
      slot.tensor.set_data(slot.tensor.to(at::kHalf));
  }
  at::Tensor ids = at::tensor({5, 6, 7, 9, 11}, at::kLong).unsqueeze(0);
  at::Tensor got = model(ids).last_hidden_state;
  EXPECT_EQ(got.scalar_type(), at::kHalf);  // final_layer_norm's dtype
  EXPECT_LE(relative_error(got, reference(ids).last_hidden_state), 5e-3);
}

TEST(T5EncoderModel, HugeHalvesStayFinite) {
  auto model = load<T5EncoderModel>("T5EncoderModel-1");
  model->to(at::kHalf);
  // A feed-forward output far beyond 65504 is clamped, as in Python.
  for (weights::Slot& slot : weights::collect_slots(*model)) {
    if (slot.name().find(".wo.") != std::string::npos)
      slot.tensor.set_data(at::full_like(slot.tensor, 3e4));
  }
  EXPECT_TRUE(model(at::tensor({5, 6, 7}, at::kLong).unsqueeze(0))
                  .last_hidden_state.isfinite()
                  .all()
                  .item<bool>());
}

TEST(T5EncoderModel, KeysOfAWholeT5) {
  T5Config config;
  config.num_layers = 1;
  T5EncoderModel model(config);
  EXPECT_EQ(model.map_key("encoder.embed_tokens.weight"), "shared.weight");
  EXPECT_EQ(model.map_key("shared.weight"), "shared.weight");
  EXPECT_EQ(model.map_key("decoder.block.0.layer.0.SelfAttention.q.weight"), "");
  EXPECT_EQ(model.map_key("lm_head.weight"), "");
}

TEST(TextEncoders, ConfigsRoundTrip) {
  for (const char* name : {"CLIPTextModel-0", "CLIPTextModel-1"}) {
    nlohmann::json written = nlohmann::json::parse(load<CLIPTextModel>(name)->config_json().dump());
    EXPECT_EQ(written,
              nlohmann::json::parse(read_fixture_json(fixture(name) + "/config.json").dump()));
  }
  for (const char* name : {"T5EncoderModel-0", "T5EncoderModel-1"}) {
    nlohmann::json written =
        nlohmann::json::parse(load<T5EncoderModel>(name)->config_json().dump());
    EXPECT_EQ(written,
              nlohmann::json::parse(read_fixture_json(fixture(name) + "/config.json").dump()));
  }
}

}  // namespace
}  // namespace ferry::models
