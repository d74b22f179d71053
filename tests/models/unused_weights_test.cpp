// Only what is used is read: layers above the highest hidden state that is wanted, heads and halves
// of models that a call leaves out.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "../io/temp_folder.h"
#include "ferry/base/error.h"
#include "ferry/hooks/group_offloading.h"
#include "ferry/models/model.h"

namespace ferry::models {
namespace {

using Json = nlohmann::ordered_json;
using ::testing::HasSubstr;

const Json kClip = Json::parse(R"({"vocab_size": 100, "hidden_size": 128, "intermediate_size": 512,
    "projection_dim": 2048, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 16, "eos_token_id": 99})");
const Json kT5 = Json::parse(R"({"vocab_size": 100, "d_model": 128, "d_kv": 32, "d_ff": 512,
    "num_layers": 4, "num_heads": 4, "feed_forward_proj": "gated-gelu"})");
const Json kVae = Json::parse(R"({"block_out_channels": [32, 64], "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"], "layers_per_block": 1,
    "norm_num_groups": 8, "use_quant_conv": true, "use_post_quant_conv": true})");

class UnusedWeights : public ::testing::Test {
 protected:
  // Loads `class_name` with random weights from a folder.
  std::shared_ptr<Model> load(const std::string& class_name, const Json& config) {
    const std::filesystem::path folder = folder_ / class_name;
    if (!std::filesystem::exists(folder)) {
      auto model = make_model(class_name, config);
      at::manual_seed(1);
      for (const weights::Slot& slot : weights::collect_slots(*model)) {
        at::Tensor tensor = slot.tensor;
        tensor.set_data(at::randn(tensor.sizes()) * 0.1);
      }
      model->save_pretrained(folder);
    }
    return load_model(folder, {}, class_name);
  }

  // Runs it streamed and resident; the outputs are the same, and nothing is read of modules whose
  // names contain one of `left_out`. Returns the outputs' names.
  std::vector<std::string> expect_unread(const std::string& class_name, const Json& config,
                                         const std::string& method, const NamedTensors& inputs,
                                         const nlohmann::json& arguments,
                                         const std::vector<std::string>& left_out) {
    auto model = load(class_name, config);
    uint64_t used = 0, unused = 0, groups = 0;
    for (const weights::BoundSlot& bound : model->binding()->slots) {
      const std::string& name = bound.slot.name();
      if (name.find("embed") != std::string::npos || name == "shared.weight") continue;  // gathered
      const bool left = std::any_of(left_out.begin(), left_out.end(), [&](const std::string& part) {
        return name.find(part) != std::string::npos;
      });
      (left ? unused : used) += bound.source.size_bytes;
      ++groups;
    }
    offload::EngineOptions options;
    options.weights_memory_bytes = 64 << 20;
    options.small_slot_bytes = 0;
    auto engine = std::make_shared<offload::Engine>(options);
    auto offloading = hooks::apply_group_offloading(
        *model, model->binding(), engine, {.unused = model->unused_modules(method, arguments)});
    NamedTensors streamed = model->forward_named(method, inputs, arguments);
    constexpr uint64_t kOverRead = 2 * 4096;
    const uint64_t read = engine->report().bytes_read;
    EXPECT_GE(read, used);
    EXPECT_LE(read, used + groups * kOverRead);
    if (!left_out.empty()) {
      EXPECT_GT(unused, groups * kOverRead) << "the test would not notice";
    }
    // A call that uses everything still can.
    EXPECT_NO_THROW(model->forward_named(method, inputs, {}));

    auto resident = load(class_name, config);
    std::vector<std::string> names;
    for (const auto& [name, tensor] : resident->forward_named(method, inputs, arguments)) {
      EXPECT_TRUE(at::equal(streamed.at(name), tensor)) << name;
      names.push_back(name);
    }
    return names;
  }

  testing_io::TempFolder folder_;
  NamedTensors ids_ = {{"input_ids", at::tensor({5, 6, 7, 99}, at::kLong).unsqueeze(0)}};
};

TEST_F(UnusedWeights, LayersAboveTheHiddenStateThatIsWanted) {
  const nlohmann::json wanted = {{"outputs", {"hidden_states.-2"}}};
  for (const char* name : {"CLIPTextModel", "CLIPTextModelWithProjection"}) {
    EXPECT_EQ(expect_unread(name, kClip, "forward", ids_, wanted,
                            {"layers.3.", "final_layer_norm", "text_projection"}),
              std::vector<std::string>{"hidden_states.-2"});
  }
  EXPECT_EQ(expect_unread("T5EncoderModel", kT5, "forward", ids_, wanted,
                          {"block.3.", "final_layer_norm"}),
            std::vector<std::string>{"hidden_states.-2"});
  expect_unread("T5EncoderModel", kT5, "forward", ids_, {{"outputs", {"hidden_states.1"}}},
                {"block.1.", "block.2.", "block.3.", "final_layer_norm"});
}

TEST_F(UnusedWeights, HeadsAndHalves) {
  expect_unread("CLIPTextModelWithProjection", kClip, "forward", ids_,
                {{"outputs", {"last_hidden_state"}}}, {"text_projection"});
  const at::Tensor z = at::randn({1, 4, 8, 8}), sample = at::randn({1, 3, 16, 16});
  expect_unread("AutoencoderKL", kVae, "decode", {{"z", z}}, {}, {"encoder.", ".quant_conv"});
  expect_unread("AutoencoderKL", kVae, "encode", {{"sample", sample}}, {},
                {"decoder.", "post_quant_conv"});
}

TEST_F(UnusedWeights, AllIsReadWhereAllIsWanted) {
  const nlohmann::json all = {{"output_hidden_states", true}};
  EXPECT_EQ(expect_unread("CLIPTextModel", kClip, "forward", ids_, all, {}).size(), 2u + 5u);
  EXPECT_EQ(expect_unread("T5EncoderModel", kT5, "forward", ids_, all, {}).size(), 1u + 5u);
}

// Single states are those of the whole list.
TEST_F(UnusedWeights, StatesCountFromBothEnds) {
  for (const auto& [name, config] :
       {std::pair{"CLIPTextModel", kClip}, std::pair{"T5EncoderModel", kT5}}) {
    auto model = load(name, config);
    const NamedTensors all =
        model->forward_named("forward", ids_, {{"output_hidden_states", true}});
    for (int64_t i = 0; i < 5; ++i) {
      for (int64_t entry : {i, i - 5}) {
        const std::string asked = "hidden_states." + std::to_string(entry);
        const NamedTensors one = model->forward_named("forward", ids_, {{"outputs", {asked}}});
        ASSERT_EQ(one.size(), 1u) << asked;
        EXPECT_TRUE(at::equal(one.at(asked), all.at("hidden_states." + std::to_string(i))))
            << name << " " << asked;
      }
    }
    for (const char* wrong :
         {"hidden_states.5", "hidden_states.-6", "hidden_states.", "hidden_states.x", "logits"}) {
      EXPECT_THAT(testing_io::error_of<ArgumentError>([&] {
                    model->forward_named("forward", ids_, {{"outputs", {wrong}}});
                  }),
                  HasSubstr("hidden_states"))
          << wrong;
    }
  }
}

}  // namespace
}  // namespace ferry::models
