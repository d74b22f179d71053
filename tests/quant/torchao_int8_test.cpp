#include "ferry/quant/torchao_int8.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "../fixture_tensors.h"
#include "ferry/base/error.h"
#include "ferry/tensor/dtype.h"

namespace ferry::quant {
namespace {

using ::testing::HasSubstr;

std::map<std::string, at::Tensor> fixture() {
  return ferry::testing::read_fixture_tensors(FERRY_FIXTURES "/quant/int8.safetensors");
}

std::vector<int64_t> block_of(const at::Tensor& weight, const at::Tensor& scale) {
  return {weight.size(0) / scale.size(0), weight.size(1) / scale.size(1)};
}

at::Tensor rows_of(const QuantizedWeight& weight, ComponentTensors components, int64_t first,
                   int64_t count, at::ScalarType dtype) {
  at::Tensor into = at::empty({count, weight.columns()}, at::TensorOptions().dtype(dtype));
  weight.dequantize_rows(components, first, count, dtype, into.mutable_data_ptr());
  return into;
}

const char* const kDtypes[] = {"float32", "bfloat16", "float16"};
const char* const kGranularities[] = {"row", "tensor", "group"};

TEST(Int8Weight, DequantizesAsTorchaoBitForBit) {
  auto tensors = fixture();
  for (std::string dtype : kDtypes) {
    for (std::string granularity : kGranularities) {
      std::string key = dtype + "." + granularity + ".";
      std::vector<at::Tensor> components{tensors.at(key + "qdata"), tensors.at(key + "scale"),
                                         tensors.at(key + "zero_point")};
      Int8Weight weight(components[0].sizes().vec(), block_of(components[0], components[1]),
                        /*has_zero_point=*/true);
      const at::Tensor& expected = tensors.at(key + "dequantized");
      EXPECT_TRUE(at::equal(weight.dequantize(components, at::kFloat), expected)) << key;
      // Older files have no zero points.
      Int8Weight without(weight.shape().vec(), weight.block_size().vec(), false);
      EXPECT_TRUE(at::equal(without.dequantize(ComponentTensors(components).first(2), at::kFloat),
                            expected));
    }
  }
}

TEST(Int8Weight, RowsEqualTheWholeForEveryBlockDtypeAndZeroPoint) {
  auto generator = at::detail::createCPUGenerator(3);
  for (std::vector<int64_t> block : {std::vector<int64_t>{1, 60}, {1, 20}, {12, 60}, {4, 15}}) {
    for (bool zero_point : {false, true}) {
      for (io::Dtype scale_dtype : {io::Dtype::F32, io::Dtype::BF16, io::Dtype::F16}) {
        Int8Weight weight({12, 60}, block, zero_point, scale_dtype);
        std::vector<at::Tensor> components;
        for (const Component& component : weight.components()) {
          at::Tensor random = at::randn(component.shape, generator);
          if (component.dtype == io::Dtype::I8) random = (random * 40).clamp(-128, 127);
          components.push_back(random.to(tensor::to_torch(component.dtype)));
        }
        for (at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
          at::Tensor whole = weight.dequantize(components, dtype);
          EXPECT_TRUE(at::equal(rows_of(weight, components, 3, 8, dtype), whole.narrow(0, 3, 8)));
          at::Tensor value =
              (components[0][5][37].to(at::kFloat) -
               (zero_point ? components[2][5 / block[0]][37 / block[1]].item<float>() : 0.0F)) *
              components[1][5 / block[0]][37 / block[1]].to(at::kFloat);
          EXPECT_EQ(whole[5][37].item<float>(), value.to(dtype).item<float>());
        }
      }
    }
  }
}

TEST(Int8Weight, CutsRowsWithTheirScales) {
  auto rows = [](const Int8Weight& weight) {
    std::vector<weights::StoredTensor> stored;
    for (const Component& component : weight.components()) {
      weights::StoredTensor tensor;
      tensor.key = component.name;
      tensor.dtype = component.dtype;
      tensor.shape = component.shape;
      tensor.size_bytes = io::item_size(component.dtype) * component.shape[0] * component.shape[1];
      tensor.offset = 1000;
      stored.push_back(tensor);
    }
    return weight.rows_of(stored, 4, 2);
  };
  StoredQuantized by_row = rows(Int8Weight({6, 8}, {1, 4}, true));
  EXPECT_EQ(by_row.weight->shape(), at::IntArrayRef({2, 8}));
  EXPECT_EQ(by_row.components[0].offset, 1000 + 4 * 8);
  EXPECT_EQ(by_row.components[1].offset, 1000 + 4 * 2 * 4);
  EXPECT_EQ(by_row.components[1].shape, (std::vector<int64_t>{2, 2}));
  StoredQuantized whole = rows(Int8Weight({6, 8}, {6, 8}, false));
  EXPECT_EQ(whole.components[1].offset, 1000);
  const auto& cut = dynamic_cast<const Int8Weight&>(*whole.weight);
  EXPECT_EQ(cut.block_size(), at::IntArrayRef({2, 8}));
}

TEST(Int8Weight, RefusesWhatDoesNotFit) {
  auto error = [](auto... arguments) -> std::string {
    try {
      Int8Weight weight(arguments...);
    } catch (const ArgumentError& e) {
      return e.what();
    }
    return "no error";
  };
  using Shape = std::vector<int64_t>;
  EXPECT_THAT(error(Shape{4, 8}, Shape{1, 3}, true),
              HasSubstr("shape [4, 8] with block_size [1, 3]"));
  EXPECT_THAT(error(Shape{4, 8}, Shape{0, 8}, true), HasSubstr("block_size [0, 8]"));
  EXPECT_THAT(error(Shape{2, 4, 8}, Shape{1, 1, 8}, true), HasSubstr("two dimensions"));
  EXPECT_THAT(error(Shape{4, 8}, Shape{1, 8}, true, io::Dtype::I32), HasSubstr("scales of I32"));
  EXPECT_THAT(error(Shape{4, 8}, Shape{1, 4}, true, io::Dtype::F32, Activation::int8_per_token),
              HasSubstr("a scale spans the row"));
  EXPECT_THAT(error(Shape{4, 8}, Shape{1, 8}, true, io::Dtype::F32, Activation::float8_per_token),
              HasSubstr("int8 per token"));
  EXPECT_THROW(quantize_int8(at::ones({4, 8}), {1, 5}), ArgumentError);
}

TEST(QuantizeInt8, EqualsTorchaoBitForBit) {
  auto tensors = fixture();
  for (std::string dtype : kDtypes) {
    for (std::string granularity : kGranularities) {
      std::string key = dtype + "." + granularity + ".";
      at::Tensor weight = tensors.at(key + "weight");
      Int8Components got = quantize_int8(weight, block_of(weight, tensors.at(key + "scale")));
      EXPECT_TRUE(at::equal(got.scale, tensors.at(key + "scale"))) << key;
      EXPECT_TRUE(at::equal(got.qdata, tensors.at(key + "qdata"))) << key;
      EXPECT_TRUE(at::equal(got.zero_point, tensors.at(key + "zero_point"))) << key;
    }
  }
}

}  // namespace
}  // namespace ferry::quant
