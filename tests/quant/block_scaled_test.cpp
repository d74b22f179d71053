#include "ferry/quant/block_scaled.h"

#include <gmock/gmock.h>

#include "../io/temp_folder.h"
#include "ferry/base/error.h"
#include "ferry/quant/torchao.h"
#include "quant_fixture.h"

namespace ferry::quant {
namespace {

using ::testing::HasSubstr;

TEST(BlockScaled, Nvfp4WithAndWithoutSwizzleAndTensorScale) {
  StoredWeights weights = expect_fixture("torchao_nvfp4");
  EXPECT_EQ(weights.quantized.at("both.weight").weight->components().size(), 3u);
}

TEST(BlockScaled, MxWithAndWithoutSwizzle) {
  StoredWeights weights = expect_fixture("torchao_mx");
  EXPECT_EQ(weights.quantized.at("e2m1.weight").weight->scheme(), "TorchAO MXFP4");
  EXPECT_EQ(weights.quantized.at("e5m2.weight").weight->scheme(), "TorchAO MXFP8");
}

TEST(BlockScaled, RowsAreCutUnlessSwizzled) {
  StoredWeights weights =
      read_weights(*weights::Checkpoint::open_file(fixture("torchao_nvfp4.safetensors")));
  const StoredQuantized& whole = weights.quantized.at("scaled.weight");
  at::Tensor expected = whole.weight->dequantize(read_components(whole), at::kFloat);
  expect_dequantizes(whole.weight->rows_of(whole.components, 3, 20),
                     expected.narrow(0, 3, 20).contiguous());
  const StoredQuantized& swizzled = weights.quantized.at("swizzled.weight");
  EXPECT_THROW(swizzled.weight->rows_of(swizzled.components, 0, 128), FormatError);
}

TEST(BlockScaledErrors, ScalesOfAnotherNumber) {
  Damaged damaged("torchao_nvfp4");
  damaged.tensor("swizzled._weight_scale").shape = {32, 32};
  EXPECT_THAT(
      testing_io::error_of<FormatError>([&] { read_torchao(damaged.metadata, damaged.weights); }),
      HasSubstr("got swizzled scales of shape [32, 32], expected 2048 in all"));
  Damaged plain("torchao_mx");
  plain.tensor("e4m3._weight_scale").shape = {32, 3};
  EXPECT_THAT(
      testing_io::error_of<FormatError>([&] { read_torchao(plain.metadata, plain.weights); }),
      HasSubstr("got scales of shape [32, 3], expected [32, 2]"));
}

TEST(BlockScaledErrors, ElementsThatAreNotRead) {
  Damaged damaged("torchao_mx");
  damaged.replace("e4m3.weight", "{\"_type\": \"torch.dtype\", \"_data\": \"float8_e4m3fn\"}",
                  "\"fp6_e3m2\"");
  EXPECT_THAT(
      testing_io::error_of<FormatError>([&] { read_torchao(damaged.metadata, damaged.weights); }),
      HasSubstr("elements of \"fp6_e3m2\""));
}

TEST(BlockScaledErrors, ColumnsThatAreNoWholeBlocks) {
  EXPECT_THROW(BlockScaledWeight({4, 24}, {.block_size = 16, .scale_shape = {4, 1}}),
               ArgumentError);
  EXPECT_THROW(BlockScaledWeight({4, 32}, {.block_size = 0, .scale_shape = {4, 2}}), ArgumentError);
}

}  // namespace
}  // namespace ferry::quant
