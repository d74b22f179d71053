#include "ferry/quant/torchao_int4.h"

#include "ferry/base/error.h"
#include "quant_fixture.h"

namespace ferry::quant {
namespace {

TEST(Int4, GroupsOfEverySizeInAFileWhoseHeaderIsNotAligned) {
  StoredWeights weights = expect_fixture("torchao_int4");
  EXPECT_NE(weights.plain.at(0).offset % 2, 0u);
  EXPECT_EQ(weights.quantized.at("g64.weight").weight->activation(), Activation::as_is);
  EXPECT_EQ(weights.quantized.at("g128.weight").weight->activation(), Activation::float8_per_token);
}

TEST(Int4, QuantizesAsTheFormula) {
  auto source = weights::Checkpoint::open_file(fixture("torchao_encoders.safetensors"));
  auto read = [&](const std::string& key) { return weights::read_stored(*source->find(key)); };
  for (const char* dtype : {"bfloat16", "float32"}) {
    SCOPED_TRACE(dtype);
    const std::string prefix = std::string(dtype) + ".int4.";
    Int4Components made = quantize_int4(read(std::string(dtype) + ".weight"), 32);
    EXPECT_TRUE(same_bits(made.qdata, read(prefix + "qdata")));
    EXPECT_TRUE(same_bits(made.scale, read(prefix + "scale")));
    EXPECT_TRUE(same_bits(made.zero_point, read(prefix + "zero_point")));
  }
}

TEST(Int4, RefusesWhatItIsNot) {
  EXPECT_THROW(Int4Weight({4, 9}, 9), ArgumentError);
  EXPECT_THROW(Int4Weight({4, 64}, 0), ArgumentError);
  EXPECT_THROW(Int4Weight({4, 64}, 32, io::Dtype::I8), ArgumentError);
  EXPECT_THROW(quantize_int4(at::zeros({4, 96}), 64), ArgumentError);
}

}  // namespace
}  // namespace ferry::quant
