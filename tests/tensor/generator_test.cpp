#include "ferry/tensor/generator.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "ferry/base/error.h"

namespace ferry::tensor {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

Generator seeded(uint64_t seed) {
  return Generator().manual_seed(seed);
}

// Expected numbers: torch.randn with torch.Generator().manual_seed(n), torch 2.11 on the CPU. Below
// 16 elements torch draws one by one, from 16 on in blocks.
void expect_values(const at::Tensor& got, const std::vector<float>& expected,
                   double tolerance = 1e-6) {
  ASSERT_EQ(got.numel(), static_cast<int64_t>(expected.size()));
  at::Tensor flat = got.to(at::kFloat).reshape({-1});
  for (size_t i = 0; i < expected.size(); ++i)
    EXPECT_NEAR(flat[i].item<float>(), expected[i], tolerance) << i;
}

TEST(Generator, DefaultSeedIsTorchs) {
  Generator generator;
  EXPECT_EQ(generator.initial_seed(), 67280421310721u);
  expect_values(randn_tensor({4}, {generator}),
                {0.977263153f, 1.15685833f, -0.38065365f, 1.25250173f});
}

TEST(Generator, SeedGivesPythonsNoiseAndGoesOn) {
  Generator generator = seeded(0);
  expect_values(randn_tensor({2, 3}, {generator}), {1.54099607f, -0.293428898f, -2.17878938f,
                                                    0.568431258f, -1.08452237f, -1.39859545f});
  expect_values(randn_tensor({20}, {generator}),
                {-0.0885314271f, 0.523883283f,  -0.665871322f, 0.850377381f, -0.613583088f,
                 0.0315927416f,  -0.492676973f, 0.248414755f,  0.439695835f, 0.112411186f,
                 0.64079237f,    0.441156268f,  -0.102309652f, 0.792443991f, -0.289667696f,
                 0.0525074862f,  0.522860467f,  2.30220532f,   -1.46889389f, -1.58668876f});
}

TEST(Generator, DrawsInTheWantedDtype) {
  expect_values(randn_tensor({2, 9}, {seeded(7)}, at::kBFloat16),
                {-0.97265625f, -0.306640625f, -0.392578125f, 0.466796875f, 0.77734375f, 1.5078125f,
                 1.046875f, -0.107421875f, 0.70703125f, 0.0f, 1.3984375f, 2.09375f, -0.123535156f,
                 0.223632812f, 0.52734375f, -1.21875f, 1.3203125f, 0.0f},
                0.0);
  expect_values(randn_tensor({3}, {seeded(7)}, at::kHalf),
                {-0.146850586f, 0.786132812f, 0.946777344f}, 0.0);
  EXPECT_EQ(randn_tensor({3}, {seeded(7)}, at::kHalf).scalar_type(), at::kHalf);
  EXPECT_NEAR(randn_tensor({3}, {seeded(7)}, at::kDouble)[2].item<double>(), 0.9468216090039564,
              1e-15);
}

TEST(Generator, AListDrawsOneSampleFromEach) {
  expect_values(randn_tensor({2, 2, 2}, {seeded(1), seeded(2)}),
                {0.661352158f, 0.266924113f, 0.0616772585f, 0.621317327f, 0.392296821f,
                 -0.223564014f, -0.319500268f, -1.20503712f});
  // A list of one is one generator for the whole batch.
  EXPECT_TRUE(at::equal(randn_tensor({3, 7}, std::vector<Generator>{seeded(4)}),
                        randn_tensor({3, 7}, {seeded(4)})));
  EXPECT_THAT(
      [] {
        randn_tensor({3, 2}, {seeded(1), seeded(2)});
      },
      ThrowsMessage<ArgumentError>(HasSubstr("2 generators for a batch of 3")));
}

TEST(Generator, NegativeSeedsAreTheirTwosComplement) {
  Generator generator = seeded(static_cast<uint64_t>(int64_t{-1}));
  EXPECT_EQ(generator.initial_seed(), 18446744073709551615u);
  expect_values(randn_tensor({2}, {generator}), {1.21976304f, -0.392979473f});
}

TEST(Generator, StateIsPythonsAndRestoresTheSequence) {
  Generator generator = seeded(5);
  randn_tensor({3}, {generator});
  at::Tensor state = generator.get_state();
  EXPECT_EQ(state.numel(), 5056);
  EXPECT_EQ(state.to(at::kLong).sum().item<int64_t>(), 326139);  // sum of Python's bytes
  at::Tensor first = randn_tensor({33}, {generator});
  Generator other;
  other.set_state(state);
  EXPECT_TRUE(at::equal(randn_tensor({33}, {other}), first));
  EXPECT_THAT([&] { other.set_state(at::zeros({3}, at::kByte)); },
              ThrowsMessage<ArgumentError>(HasSubstr("set_state")));
}

TEST(Generator, CopiesShareTheState) {
  Generator one = seeded(9), reference = seeded(9);
  Generator other = one;
  at::Tensor first = randn_tensor({2}, {one}), second = randn_tensor({2}, {other});
  EXPECT_TRUE(at::equal(first, randn_tensor({2}, {reference})));
  EXPECT_TRUE(at::equal(second, randn_tensor({2}, {reference})));
}

TEST(Generator, SeedFromTheSystemIsReported) {
  Generator generator;
  uint64_t seed = generator.seed();
  EXPECT_EQ(generator.initial_seed(), seed);
  EXPECT_TRUE(at::equal(randn_tensor({8}, {generator}), randn_tensor({8}, {seeded(seed)})));
}

}  // namespace
}  // namespace ferry::tensor
