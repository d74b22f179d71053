#include "ferry/quant/float_codes.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "ferry/base/error.h"
#include "ferry/tensor/dtype.h"

namespace ferry::quant {
namespace {

TEST(FloatCodes, AgreeWithTorch) {
  at::Tensor bytes = at::arange(256).to(at::kByte);
  for (io::Dtype dtype : {io::Dtype::F8_E4M3, io::Dtype::F8_E5M2, io::Dtype::F8_E8M0}) {
    at::Tensor expected = bytes.view(tensor::to_torch(dtype)).to(at::kFloat);
    EXPECT_TRUE(at::allclose(look_up(bytes, byte_values(dtype)), expected, 0, 0, true))
        << io::name(dtype);
  }
  EXPECT_EQ(byte_values(io::Dtype::F8_E8M0)[127], 1.0f);
  EXPECT_EQ(byte_values(io::Dtype::F8_E8M0)[0], 0x1p-127f);
  EXPECT_TRUE(std::isnan(byte_values(io::Dtype::F8_E8M0)[255]));
  EXPECT_THROW(byte_values(io::Dtype::U8), ArgumentError);
}

TEST(FloatCodes, NibblesInEitherOrder) {
  at::Tensor bytes = at::tensor({0x21, 0x43}, at::kInt).to(at::kByte).view({1, 2});
  EXPECT_TRUE(
      unpack_nibbles(bytes, false).equal(at::tensor({1, 2, 3, 4}).to(at::kByte).view({1, 4})));
  EXPECT_TRUE(
      unpack_nibbles(bytes, true).equal(at::tensor({2, 1, 4, 3}).to(at::kByte).view({1, 4})));
}

TEST(FloatCodes, BlocksBecomeElements) {
  at::Tensor blocks = at::arange(4, at::kFloat).view({2, 2});
  at::Tensor expected = at::tensor({0.f, 0.f, 1.f, 1.f, 2.f, 2.f, 3.f, 3.f}).view({2, 4});
  EXPECT_TRUE(expand_blocks(blocks, 2, 4).equal(expected));
  EXPECT_EQ(expand_blocks(blocks, 6, 4)[2][3].item<float>(), 1);
}

}  // namespace
}  // namespace ferry::quant
