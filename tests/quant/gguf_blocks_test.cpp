#include "ferry/quant/gguf_blocks.h"

#include <gtest/gtest.h>

#include "../fixture_tensors.h"

namespace ferry::quant {
namespace {

constexpr const char* kTypes[] = {"Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K",   "Q2_K",
                                  "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS"};

// Random blocks, dequantized by the gguf package.
TEST(GgufBlocks, DequantizeBitForBit) {
  auto fixture =
      ferry::testing::read_fixture_tensors(FERRY_FIXTURES "/quant/gguf_blocks.safetensors");
  EXPECT_EQ(fixture.size(), 2 * std::size(kTypes));
  for (std::string name : kTypes) {
    const at::Tensor &blocks = fixture.at(name + ".blocks"), &values = fixture.at(name + ".values");
    io::GgmlType type = *io::parse_ggml_type(name);
    const int64_t count = values.numel() / io::block_elements(type);
    ASSERT_EQ(blocks.numel(), count * io::block_bytes(type)) << name;
    at::Tensor got = at::full_like(values, -1);
    find_dequantize(type)(static_cast<const std::byte*>(blocks.const_data_ptr()), count,
                          got.mutable_data_ptr<float>());
    // As bits: -0 is not 0.
    EXPECT_TRUE(at::equal(got.view(at::kInt), values.view(at::kInt))) << name;
    EXPECT_GT(values.ne(0).sum().item<int64_t>(), values.numel() / 3) << name;
  }
}

TEST(GgufBlocks, QuantizeByteForByte) {
  auto fixture =
      ferry::testing::read_fixture_tensors(FERRY_FIXTURES "/quant/gguf_quantize.safetensors");
  const at::Tensor& values = fixture.at("values");
  for (std::string name : {"Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"}) {
    const at::Tensor& expected = fixture.at(name + ".blocks");
    io::GgmlType type = *io::parse_ggml_type(name);
    at::Tensor got = at::full_like(expected, 77);
    find_quantize(type)(values.const_data_ptr<float>(), values.numel() / io::block_elements(type),
                        static_cast<std::byte*>(got.mutable_data_ptr()));
    EXPECT_TRUE(at::equal(got, expected)) << name;
  }
}

TEST(GgufBlocks, OtherTypesHaveNoFunctions) {
  for (io::GgmlType type : {io::GgmlType::F32, io::GgmlType::BF16, io::GgmlType::IQ2_XS}) {
    EXPECT_EQ(find_dequantize(type), nullptr);
    EXPECT_EQ(find_quantize(type), nullptr);
  }
  EXPECT_EQ(find_quantize(io::GgmlType::Q4_K), nullptr);
}

}  // namespace
}  // namespace ferry::quant
