#include "ferry/quant/comfy.h"

#include <gmock/gmock.h>

#include "../io/temp_folder.h"
#include "ferry/base/error.h"
#include "quant_fixture.h"

namespace ferry::quant {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::UnorderedElementsAre;

std::string error_with(const std::string& name, const std::function<void(Damaged&)>& damage,
                       const std::map<std::string, std::string>& replaced = {}) {
  Damaged damaged(name);
  damage(damaged);
  return testing_io::error_of<FormatError>([&] {
    read_comfy(damaged.metadata, damaged.weights, [&](const weights::StoredTensor& tensor) {
      auto found = replaced.find(tensor.key);
      return found == replaced.end() ? read_bytes(tensor) : found->second;
    });
  });
}

TEST(Comfy, LayersOfTheMetadataWithoutTheKeysPrefix) {
  StoredWeights weights = expect_fixture("comfy_metadata");
  EXPECT_THAT(plain_names(weights), ElementsAre("model.diffusion_model.a.bias"));
  auto scheme = [&](const char* layer) {
    return weights.quantized.at(std::string("model.diffusion_model.") + layer + ".weight")
        .weight->scheme();
  };
  EXPECT_EQ(scheme("a"), "ComfyUI fp8");
  EXPECT_EQ(scheme("c"), "ComfyUI NVFP4");
  EXPECT_EQ(scheme("d"), "ComfyUI MXFP8");
}

TEST(Comfy, DescriptionsBesideTheWeights) {
  StoredWeights weights = expect_fixture("comfy_tensors");
  EXPECT_TRUE(weights.plain.empty());
}

TEST(Comfy, MarkerAndScaleWeight) {
  StoredWeights weights = expect_fixture("comfy_legacy");
  EXPECT_THAT(plain_names(weights), UnorderedElementsAre("model.diffusion_model.a.bias",
                                                         "model.diffusion_model.norm.weight"));
}

TEST(Comfy, PlainFp8MatricesAreTheirValues) {
  StoredWeights weights = expect_fixture("plain_fp8");
  EXPECT_THAT(plain_names(weights), UnorderedElementsAre("a.bias", "conv.weight"));
  EXPECT_EQ(weights.quantized.at("a.weight").components.size(), 1u);
}

TEST(Comfy, RowsAreCutWithOneScaleAndWithOneARow) {
  StoredWeights weights =
      read_weights(*weights::Checkpoint::open_file(fixture("comfy_metadata.safetensors")));
  for (const char* name : {"model.diffusion_model.a.weight", "model.diffusion_model.b.weight"}) {
    const StoredQuantized& whole = weights.quantized.at(name);
    at::Tensor expected = whole.weight->dequantize(read_components(whole), at::kFloat);
    expect_dequantizes(whole.weight->rows_of(whole.components, 5, 9),
                       expected.narrow(0, 5, 9).contiguous());
  }
}

TEST(Comfy, OtherCheckpointsAreLeftAlone) {
  Damaged other("bitsandbytes_int8");
  EXPECT_FALSE(read_comfy(other.metadata, other.weights, read_bytes));
}

TEST(ComfyErrors, NameLayerAndFormat) {
  EXPECT_THAT(error_with("comfy_tensors", [](Damaged&) {},
                         {{"b.comfy_quant", R"({"format": "convrot_w4a4"})"}}),
              AllOf(HasSubstr("comfy_tensors.safetensors"), HasSubstr("layer 'b'"),
                    HasSubstr("\"convrot_w4a4\"")));
  EXPECT_THAT(error_with("comfy_tensors", [](Damaged&) {},
                         {{"b.comfy_quant", R"({"format": "int8_tensorwise", "convrot": true})"}}),
              AllOf(HasSubstr("layer 'b'"), HasSubstr("\"convrot\"")));
  EXPECT_THAT(error_with("comfy_tensors", [](Damaged&) {}, {{"b.comfy_quant", R"({"form": 1})"}}),
              HasSubstr("expected an object with \"format\""));
  EXPECT_THAT(error_with("comfy_tensors", [](Damaged&) {}, {{"b.comfy_quant", "{"}}),
              HasSubstr("'b.comfy_quant'"));
  EXPECT_THAT(error_with("comfy_metadata",
                         [](Damaged& checkpoint) {
                           checkpoint.metadata["_quantization_metadata"] = R"({"layers": []})";
                         }),
              HasSubstr("expected an object with \"layers\""));
}

TEST(ComfyErrors, MissingComponentsAndWrongShapes) {
  const std::string prefix = "model.diffusion_model.";
  EXPECT_THAT(
      error_with("comfy_metadata",
                 [&](Damaged& checkpoint) { checkpoint.remove(prefix + "c.weight_scale_2"); }),
      AllOf(HasSubstr("c.weight_scale_2' is missing"), HasSubstr(prefix + "c.weight")));
  EXPECT_THAT(error_with("comfy_metadata",
                         [&](Damaged& checkpoint) {
                           checkpoint.tensor(prefix + "d.weight_scale").shape = {64, 8};
                         }),
              HasSubstr("expected 1024 in all"));
  EXPECT_THAT(error_with("comfy_metadata",
                         [&](Damaged& checkpoint) {
                           checkpoint.tensor(prefix + "b.weight_scale").shape = {31};
                         }),
              HasSubstr("scales of shape [31] do not divide [32, 64]"));
  EXPECT_THAT(error_with("comfy_metadata",
                         [&](Damaged& checkpoint) {
                           checkpoint.tensor(prefix + "a.weight").dtype = io::Dtype::U8;
                         }),
              HasSubstr("got values of U8"));
  EXPECT_THAT(error_with("comfy_metadata",
                         [&](Damaged& checkpoint) { checkpoint.remove(prefix + "a.weight"); }),
              HasSubstr("'a.weight' is missing"));
  EXPECT_THAT(error_with("comfy_tensors",
                         [](Damaged& checkpoint) {
                           checkpoint.tensor("d.weight_scale").shape = {3, 2};
                         }),
              HasSubstr("its scales do not divide [32, 64]"));
}

}  // namespace
}  // namespace ferry::quant
