#include "ferry/quant/bitsandbytes_4bit.h"

#include "ferry/base/error.h"
#include "quant_fixture.h"

namespace ferry::quant {
namespace {

StoredWeights read(const std::string& name) {
  return read_weights(*weights::Checkpoint::open_file(fixture(name + ".safetensors")));
}

TEST(BitsAndBytes4bit, RowsAreCutOnTheBordersOfBlocks) {
  StoredWeights weights = read("bitsandbytes_4bit");
  auto expect_cut = [&](const char* name, int64_t first, int64_t count) {
    SCOPED_TRACE(name);
    const StoredQuantized& whole = weights.quantized.at(name);
    at::Tensor expected = whole.weight->dequantize(read_components(whole), at::kFloat);
    expect_dequantizes(whole.weight->rows_of(whole.components, first, count),
                       expected.narrow(0, first, count).contiguous());
  };
  expect_cut("nf4.weight", 5, 9);
  expect_cut("fp4.weight", 4, 10);  // blocks of two rows
  expect_cut("bf16_storage.weight", 5, 9);
  expect_cut("nested_many.weight", 0, 32);  // 256 blocks, one nested block
  expect_cut("nested_many.weight", 32, 8);
}

TEST(BitsAndBytes4bit, CutsInsideABlockAreRefused) {
  StoredWeights weights = read("bitsandbytes_4bit");
  for (auto [name, first] :
       {std::pair{"fp4.weight", 3}, {"uneven.weight", 1}, {"nested_many.weight", 8}}) {
    SCOPED_TRACE(name);
    const StoredQuantized& whole = weights.quantized.at(name);
    EXPECT_THROW(whole.weight->rows_of(whole.components, first, 2), FormatError);
  }
}

TEST(BitsAndBytes4bit, QuantizesAsBitsAndBytes) {
  auto source = weights::Checkpoint::open_file(fixture("bitsandbytes_encoders.safetensors"));
  auto tensor = [&](const std::string& key) { return weights::read_stored(*source->find(key)); };
  for (const char* name : {"bfloat16.even", "bfloat16.odd", "float32.even", "float32.odd"}) {
    SCOPED_TRACE(name);
    const std::string prefix = std::string(name) + ".";
    Nf4Components made = quantize_nf4(tensor(prefix + "weight"));
    EXPECT_TRUE(same_bits(made.qdata, tensor(prefix + "qdata")));
    EXPECT_TRUE(same_bits(made.absmax, tensor(prefix + "absmax")));
    EXPECT_TRUE(same_bits(made.quant_map, tensor(prefix + "quant_map")));
  }
}

TEST(BitsAndBytes4bit, RefusesWhatItIsNot) {
  using Options = BitsAndBytes4bitWeight::Options;
  EXPECT_THROW(BitsAndBytes4bitWeight({4, 8}, Options{.quant_type = "int4"}), ArgumentError);
  EXPECT_THROW(BitsAndBytes4bitWeight({4, 8}, Options{.block_size = 0}), ArgumentError);
  EXPECT_THROW(BitsAndBytes4bitWeight({4, 8}, Options{.qdata_shape = {15, 1}}), ArgumentError);
  EXPECT_THROW(quantize_nf4(at::zeros({8})), ArgumentError);
}

}  // namespace
}  // namespace ferry::quant
