#include "ferry/quant/float8.h"

#include "ferry/base/error.h"
#include "quant_fixture.h"

namespace ferry::quant {
namespace {

TEST(Float8, RowTensorGroupAndBlock) {
  StoredWeights weights = expect_fixture("torchao_float8");
  auto activation = [&](const char* name) {
    return weights.quantized.at(name).weight->activation();
  };
  EXPECT_EQ(activation("row.weight"), Activation::as_is);
  EXPECT_EQ(activation("dynamic_row.weight"), Activation::float8_per_token);
  EXPECT_EQ(activation("dynamic_tensor.weight"), Activation::float8_per_tensor);
}

TEST(Float8, RowsAreCutWhereScalesAllow) {
  StoredWeights weights =
      read_weights(*weights::Checkpoint::open_file(fixture("torchao_float8.safetensors")));
  for (const char* name : {"row.weight", "tensor.weight", "group.weight"}) {
    SCOPED_TRACE(name);
    const StoredQuantized& whole = weights.quantized.at(name);
    StoredQuantized cut = whole.weight->rows_of(whole.components, 5, 9);
    expect_dequantizes(
        cut,
        whole.weight->dequantize(read_components(whole), at::kFloat).narrow(0, 5, 9).contiguous());
  }
  const StoredQuantized& block = weights.quantized.at("block.weight");
  EXPECT_THROW(block.weight->rows_of(block.components, 5, 9), FormatError);
}

TEST(Float8, QuantizesRowsAsTorchAo) {
  auto source = weights::Checkpoint::open_file(fixture("torchao_encoders.safetensors"));
  auto read = [&](const std::string& key) { return weights::read_stored(*source->find(key)); };
  for (const char* dtype : {"bfloat16", "float32"}) {
    SCOPED_TRACE(dtype);
    Float8Components made = quantize_float8_rows(read(std::string(dtype) + ".weight"));
    EXPECT_TRUE(same_bits(made.qdata, read(std::string(dtype) + ".float8.qdata")));
    EXPECT_TRUE(same_bits(made.scale, read(std::string(dtype) + ".float8.scale")));
  }
}

TEST(Float8, ARowOfZerosStaysZeros) {
  Float8Components made = quantize_float8_rows(at::zeros({2, 8}));
  Float8Weight weight({2, 8}, {.scale_shape = std::vector<int64_t>{2, 1}});
  std::array<at::Tensor, 2> components{made.qdata, made.scale};
  EXPECT_TRUE(same_bits(weight.dequantize(components, at::kFloat), at::zeros({2, 8})));
}

TEST(Float8, RefusesWhatItIsNot) {
  EXPECT_THROW(Float8Weight({4, 8}, {.dtype = io::Dtype::I8}), ArgumentError);
  EXPECT_THROW(Float8Weight({4, 8}, {.scale_shape = std::vector<int64_t>{3}}), ArgumentError);
  EXPECT_THROW(Float8Weight({4, 8}, {.scale_shape = std::vector<int64_t>{4, 0}}), ArgumentError);
  EXPECT_THROW(Float8Weight({4, 8}, {.activation = Activation::int8_per_token}), ArgumentError);
}

}  // namespace
}  // namespace ferry::quant
