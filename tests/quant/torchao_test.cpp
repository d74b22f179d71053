#include "ferry/quant/torchao.h"

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

std::string error_with(const std::string& name, const std::function<void(Damaged&)>& damage) {
  Damaged damaged(name);
  damage(damaged);
  return testing_io::error_of<FormatError>(
      [&] { read_torchao(damaged.metadata, damaged.weights); });
}

TEST(TorchAo, QuantizedAndPlainTensorsAreToldApart) {
  StoredWeights weights = expect_fixture("torchao_float8");
  EXPECT_THAT(plain_names(weights), UnorderedElementsAre("row.bias", "scale_shift_table"));
  EXPECT_EQ(weights.quantized.at("row.weight").components[1].key, "row._weight_scale");
}

TEST(TorchAo, ComponentsMayLieInDifferentShards) {
  auto checkpoint =
      weights::Checkpoint::open_folder(fixture("torchao_sharded"), "diffusion_pytorch_model");
  StoredWeights weights = expect_fixture(*checkpoint, "torchao_sharded");
  const StoredQuantized& a = weights.quantized.at("a.weight");
  EXPECT_NE(a.components[0].file->path(), a.components[1].file->path());
  EXPECT_THAT(plain_names(weights), UnorderedElementsAre("a.bias", "scale_shift_table"));
}

TEST(TorchAo, ListsOfShardsMayDiffer) {
  // Merged metadata keeps one shard's list; the entries tell of all weights.
  Damaged merged("torchao_float8");
  merged.metadata["tensor_names"] = R"(["row.bias"])";
  EXPECT_TRUE(read_torchao(merged.metadata, merged.weights));
  EXPECT_EQ(merged.weights.quantized.size(), 7u);
}

TEST(TorchAo, OtherCheckpointsAreLeftAlone) {
  for (const char* names : {"", "[]", "three", "{\"a\": 1}"}) {
    Damaged other("torchao_float8");
    size_t plain = other.weights.plain.size();
    other.metadata["tensor_names"] = names;
    EXPECT_FALSE(read_torchao(other.metadata, other.weights)) << names;
    EXPECT_EQ(other.weights.plain.size(), plain);
  }
  Damaged none("torchao_float8");
  none.metadata = {{"format", "pt"}};
  EXPECT_FALSE(read_torchao(none.metadata, none.weights));
}

TEST(TorchAo, Int8OfEveryGranularityWithAndWithoutZeroPoint) {
  StoredWeights weights = expect_fixture("torchao_int8");
  EXPECT_EQ(weights.quantized.at("without_zero_point.weight").components.size(), 2u);
  EXPECT_EQ(weights.quantized.at("row.weight").weight->activation(), Activation::as_is);
  EXPECT_EQ(weights.quantized.at("dynamic.weight").weight->activation(),
            Activation::int8_per_token);
}

TEST(TorchAoErrors, NameFileParameterAndComponent) {
  std::string error = error_with(
      "torchao_float8", [](Damaged& checkpoint) { checkpoint.remove("row._weight_scale"); });
  EXPECT_THAT(error, AllOf(HasSubstr("torchao_float8.safetensors"), HasSubstr("'row.weight'"),
                           HasSubstr("'row._weight_scale' is missing")));
}

TEST(TorchAoErrors, WrongShapeAndDtypeOfAComponent) {
  EXPECT_THAT(
      error_with("torchao_int8",
                 [](Damaged& checkpoint) {
                   checkpoint.tensor("row._weight_scale").shape = {31, 1};
                 }),
      AllOf(HasSubstr("'row._weight_scale' is F32 [31, 1]"), HasSubstr("expected F32 [32, 1]")));
  EXPECT_THAT(error_with("torchao_int4",
                         [](Damaged& checkpoint) {
                           checkpoint.tensor("g32._weight_qdata").dtype = io::Dtype::U8;
                         }),
              AllOf(HasSubstr("is U8 [32, 32]"), HasSubstr("expected I8 [32, 32]")));
}

TEST(TorchAoErrors, AnUnknownClassIsNamed) {
  EXPECT_THAT(error_with("torchao_float8",
                         [](Damaged& checkpoint) {
                           checkpoint.replace("row.weight", "Float8Tensor",
                                              "Int4PreshuffledTensor");
                         }),
              AllOf(HasSubstr("'row.weight' is a \"Int4PreshuffledTensor\""),
                    HasSubstr("it reads Float8Tensor, Int8Tensor")));
}

TEST(TorchAoErrors, AShapeThatLies) {
  EXPECT_THAT(error_with("torchao_int4",
                         [](Damaged& checkpoint) {
                           checkpoint.replace("g32.weight", "\"shape\": [32, 64]",
                                              "\"shape\": [32, 128]");
                         }),
              HasSubstr("\"shape\" is [32,128], but its values make [32, 64]"));
  EXPECT_THAT(error_with("torchao_float8",
                         [](Damaged& checkpoint) {
                           checkpoint.replace("group.weight", "[1, 32]", "[1, 64]");
                         }),
              HasSubstr("\"block_size\" does not make scales of [32, 4]"));
  for (const char* shape : {"[20, 2000]", "[99999999999999, 200]", "[20]", "[0, 200]", "[-8, 200]",
                            "\"wide\"", "null", "[1e9, 4]"}) {
    EXPECT_FALSE(error_with("torchao_int4_tile_packed",
                            [&](Damaged& checkpoint) {
                              checkpoint.replace("padded.weight", "[20, 200]", shape);
                            })
                     .empty())
        << shape;
  }
}

TEST(TorchAoErrors, GroupsThatDoNotDivide) {
  EXPECT_THAT(error_with("torchao_int4",
                         [](Damaged& checkpoint) {
                           checkpoint.replace("g32.weight", "[1, 32]", "[1, 48]");
                         }),
              HasSubstr("64 columns in groups of 48"));
}

TEST(TorchAoErrors, StacksOfExpertsAreRefused) {
  auto checkpoint = weights::Checkpoint::open_file(fixture("torchao_int4_experts.safetensors"));
  EXPECT_THAT(testing_io::error_of<FormatError>([&] { read_weights(*checkpoint); }),
              AllOf(HasSubstr("'experts.weight' has shape [2, 8, 32]"), HasSubstr("linear layer")));
}

TEST(TorchAoErrors, StaticScalesOfTheInputAreRefused) {
  EXPECT_THAT(error_with("torchao_int8",
                         [](Damaged& checkpoint) {
                           checkpoint.replace("row.weight", "[\"zero_point\"",
                                              "[\"act_quant_scale\", \"zero_point\"");
                         }),
              HasSubstr("component \"act_quant_scale\" is not read"));
}

TEST(TorchAoErrors, BrokenMetadata) {
  EXPECT_THAT(
      error_with("torchao_float8",
                 [](Damaged& checkpoint) { checkpoint.metadata["row.weight"] = "{\"_type"; }),
      HasSubstr("metadata of 'row.weight'"));
  EXPECT_THAT(error_with("torchao_float8",
                         [](Damaged& checkpoint) { checkpoint.metadata.erase("row.bias"); }),
              HasSubstr("lists \"row.bias\""));
  EXPECT_THAT(error_with("torchao_float8",
                         [](Damaged& checkpoint) {
                           checkpoint.metadata["row.weight"] = R"({"_type": "Float8Tensor"})";
                         }),
              HasSubstr("lacks \"_data\""));
}

}  // namespace
}  // namespace ferry::quant
