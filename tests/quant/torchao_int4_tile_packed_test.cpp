#include "ferry/quant/torchao_int4_tile_packed.h"

#include "ferry/base/error.h"
#include "quant_fixture.h"

namespace ferry::quant {
namespace {

TEST(Int4TilePacked, WithAndWithoutPadding) {
  StoredWeights weights = expect_fixture("torchao_int4_tile_packed");
  const QuantizedWeight& padded = *weights.quantized.at("padded.weight").weight;
  EXPECT_EQ(padded.shape(), at::IntArrayRef({20, 200}));
  EXPECT_EQ(padded.components()[0].shape, (std::vector<int64_t>{3, 8, 32, 4}));
}

TEST(Int4TilePacked, EveryValueHasItsOwnPlace) {
  // All values 0 but one: it shows up where it was put, and nowhere else.
  Int4TilePackedWeight weight({16, 1024}, 128);
  at::Tensor parameters = at::zeros({8, 16, 2}, at::kBFloat16);
  parameters.select(2, 0).fill_(1);
  parameters.select(2, 1).fill_(8);  // (value - 8) * 1 + 8
  at::Tensor seen = at::zeros({16, 1024});
  for (int64_t word = 0; word < 2 * 8 * 32 * 4; word += 97) {
    for (int nibble = 0; nibble < 8; ++nibble) {
      at::Tensor words = at::zeros({2, 8, 32, 4}, at::kInt);
      words.data_ptr<int32_t>()[word] = static_cast<int32_t>(5u << (4 * nibble));
      std::vector<at::Tensor> components{words, parameters};
      at::Tensor values = weight.dequantize(components, at::kFloat);
      EXPECT_EQ(values.sum().item<float>(), 5);
      EXPECT_TRUE(same_bits(values, by_rows(weight, components, at::kFloat, 16)));
      seen += values;
    }
  }
  EXPECT_EQ(seen.max().item<float>(), 5);  // no two places share a value
}

TEST(Int4TilePacked, RefusesOddGroups) {
  EXPECT_THROW(Int4TilePackedWeight({16, 1024}, 48), ArgumentError);
}

}  // namespace
}  // namespace ferry::quant
