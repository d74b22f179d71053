#include "ferry/quant/bitsandbytes_int8.h"

#include "quant_fixture.h"

namespace ferry::quant {
namespace {

TEST(BitsAndBytesInt8, RowsAreCut) {
  StoredWeights weights =
      read_weights(*weights::Checkpoint::open_file(fixture("bitsandbytes_int8.safetensors")));
  const StoredQuantized& whole = weights.quantized.at("a.weight");
  at::Tensor expected = whole.weight->dequantize(read_components(whole), at::kFloat);
  expect_dequantizes(whole.weight->rows_of(whole.components, 5, 9),
                     expected.narrow(0, 5, 9).contiguous());
}

}  // namespace
}  // namespace ferry::quant
