#include "ferry/quant/pre_scaled.h"

#include "ferry/base/error.h"
#include "ferry/quant/torchao_int4.h"
#include "quant_fixture.h"

namespace ferry::quant {
namespace {

TEST(PreScaled, MultipliesTheColumns) {
  StoredWeights weights = expect_fixture("torchao_int4");
  const StoredQuantized& stored = weights.quantized.at("pre_scaled.weight");
  EXPECT_EQ(stored.weight->components().back().name, "act_pre_scale");
  EXPECT_EQ(stored.weight->scheme(), "TorchAO int4");
}

TEST(PreScaled, RowsAreCutAsTheInnerWeights) {
  StoredWeights weights =
      read_weights(*weights::Checkpoint::open_file(fixture("torchao_int8.safetensors")));
  const StoredQuantized& whole = weights.quantized.at("pre_scaled.weight");
  at::Tensor expected = whole.weight->dequantize(read_components(whole), at::kFloat);
  expect_dequantizes(whole.weight->rows_of(whole.components, 2, 11),
                     expected.narrow(0, 2, 11).contiguous());
}

TEST(PreScaled, RefusesAScaleOfAnotherShapeOrDtype) {
  auto inner = std::make_shared<Int4Weight>(std::vector<int64_t>{4, 64}, 32);
  EXPECT_THROW(PreScaledWeight(inner, io::Dtype::BF16, {32}), ArgumentError);
  EXPECT_THROW(PreScaledWeight(inner, io::Dtype::I8, {64}), ArgumentError);
}

}  // namespace
}  // namespace ferry::quant
