#include "ferry/models/stored_binding.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "ferry/base/error.h"
#include "ferry/models/bind_options.h"
#include "ferry/nn/linear.h"
#include "ferry/quant/torchao_int8.h"
#include "ferry/testing/model_case.h"

namespace ferry::models {
namespace {

using ::testing::HasSubstr;

const std::filesystem::path kClip = FERRY_FIXTURES "/models/CLIPTextModel-0";

// The fixture's weights as a checkpoint holds them, with `name` quantized to int8.
struct Stored {
  quant::StoredWeights weights;
  std::shared_ptr<const weights::Checkpoint> checkpoint, int8;

  Stored(const std::string& name, const std::filesystem::path& folder) {
    checkpoint = weights::Checkpoint::open_folder(kClip, "model");
    weights.plain = checkpoint->tensors();
    std::erase_if(weights.plain, [&](const auto& tensor) { return tensor.key == name; });
    const weights::StoredTensor* source = checkpoint->find(name);
    if (!source) throw_error<Error>("the fixture has no {}", name);
    at::Tensor plain = weights::read_stored(*source);
    auto parts = quant::quantize_int8(plain, {1, plain.size(1)});
    const std::vector<std::pair<std::string, at::Tensor>> tensors = {{"qdata", parts.qdata},
                                                                     {"scale", parts.scale}};
    io::SafetensorsWriter writer(folder / "int8.safetensors",
                                 {{"qdata", io::Dtype::I8, parts.qdata.sizes().vec()},
                                  {"scale", io::Dtype::F32, parts.scale.sizes().vec()}});
    for (const auto& [key, tensor] : tensors)
      writer.write({static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()});
    writer.finish();
    int8 = weights::Checkpoint::open_file(folder / "int8.safetensors");
    auto description = std::make_shared<quant::Int8Weight>(
        plain.sizes().vec(), std::vector<int64_t>{1, plain.size(1)}, /*has_zero_point=*/false);
    weights.quantized[name] = {description, {*int8->find("qdata"), *int8->find("scale")}};
  }
  std::shared_ptr<weights::Binding> bind(Model& model, std::optional<at::ScalarType> dtype = {}) {
    auto files = checkpoint->files();
    files.insert(files.end(), int8->files().begin(), int8->files().end());
    return bind_stored(model, weights, checkpoint->metadata(), files, bind_options(model, dtype));
  }
};

std::shared_ptr<Model> empty_model() {
  return make_model("CLIPTextModel", load_model(kClip)->config_json());
}

TEST(StoredBinding, ComponentsAreSlotsThatACastLeavesAlone) {
  testing::TemporaryFolder folder;
  const std::string name = "encoder.layers.0.self_attn.q_proj.weight";
  Stored stored(name, folder.path());
  auto model = empty_model();
  auto binding = stored.bind(*model, at::kBFloat16);
  size_t components = 0;
  for (const weights::BoundSlot& bound : binding->slots) {
    if (!bound.slot.name().starts_with(name)) {
      EXPECT_EQ(bound.slot.dtype(), at::kBFloat16) << bound.slot.name();
      continue;
    }
    ++components;
    EXPECT_EQ(bound.slot.dtype(), bound.slot.name().ends_with("_qdata") ? at::kChar : at::kFloat);
  }
  EXPECT_EQ(components, 2u);
}

TEST(StoredBinding, AQuantizedTableOfSeveralComponentsIsRefused) {
  testing::TemporaryFolder folder;
  Stored stored("embeddings.token_embedding.weight", folder.path());
  auto model = empty_model();
  try {
    stored.bind(*model);
    FAIL() << "bound";
  } catch (const FormatError& error) {
    EXPECT_THAT(error.what(), HasSubstr("not a linear layer's weight"));
    EXPECT_THAT(error.what(), HasSubstr("TorchAO int8"));
  }
}

TEST(StoredBinding, AnotherShapeIsRefused) {
  testing::TemporaryFolder folder;
  Stored stored("encoder.layers.0.mlp.fc1.weight", folder.path());
  auto node = stored.weights.quantized.extract("encoder.layers.0.mlp.fc1.weight");
  node.key() = "encoder.layers.0.mlp.fc2.weight";
  stored.weights.quantized.insert(std::move(node));
  auto model = empty_model();
  try {
    stored.bind(*model);
    FAIL() << "bound";
  } catch (const FormatError& error) {
    EXPECT_THAT(error.what(), HasSubstr("fc2.weight"));
    EXPECT_THAT(error.what(), HasSubstr("expected ["));
  }
}

}  // namespace
}  // namespace ferry::models
