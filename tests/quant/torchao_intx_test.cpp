#include "ferry/quant/torchao_intx.h"

#include "ferry/base/error.h"
#include "quant_fixture.h"

namespace ferry::quant {
namespace {

TEST(Intx, IntegerAndFloatZeroPoints) {
  StoredWeights weights = expect_fixture("torchao_intx");
  EXPECT_EQ(weights.quantized.at("float_zero_point.weight").weight->components()[2].dtype,
            io::Dtype::BF16);
}

TEST(Intx, RowsAreCut) {
  StoredWeights weights =
      read_weights(*weights::Checkpoint::open_file(fixture("torchao_intx.safetensors")));
  const StoredQuantized& whole = weights.quantized.at("int3_asymmetric.weight");
  at::Tensor expected = whole.weight->dequantize(read_components(whole), at::kFloat);
  expect_dequantizes(whole.weight->rows_of(whole.components, 3, 20),
                     expected.narrow(0, 3, 20).contiguous());
}

TEST(Intx, RefusesWhatItIsNot) {
  EXPECT_THROW(IntxWeight({4, 64}, {1, 48}, io::Dtype::F32, io::Dtype::I8), ArgumentError);
  EXPECT_THROW(IntxWeight({4, 64}, {1}, io::Dtype::F32, io::Dtype::I8), ArgumentError);
  EXPECT_THROW(IntxWeight({4, 64}, {1, 64}, io::Dtype::I8, io::Dtype::I8), ArgumentError);
  EXPECT_THROW(IntxWeight({4, 64}, {1, 64}, io::Dtype::F32, io::Dtype::U8), ArgumentError);
}

}  // namespace
}  // namespace ferry::quant
