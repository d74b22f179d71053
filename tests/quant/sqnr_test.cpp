#include "ferry/quant/sqnr.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "ferry/quant/torchao_int8.h"

namespace ferry::quant {
namespace {

// Rows of 64 whole numbers and one more, scale 1: what is held exactly, and what is off by a
// quarter in one value a row.
TEST(Sqnr, IsTheRatioOfSquaresInDecibels) {
  const int64_t rows = 65, columns = 8;
  at::Tensor held = at::arange(rows * columns, at::kFloat).remainder(100).view({rows, columns});
  Int8Weight description({rows, columns}, {1, columns}, /*has_zero_point=*/false);
  std::vector<at::Tensor> components{held.to(at::kChar), at::ones({rows, 1})};
  EXPECT_EQ(sqnr_db(held, description, components), std::numeric_limits<double>::infinity());

  at::Tensor weight = held.clone();
  weight.select(1, 3).add_(0.25);
  const double signal = weight.square().sum(at::kDouble).item<double>();
  const double noise = rows * 0.25 * 0.25;
  EXPECT_NEAR(sqnr_db(weight, description, components), 10 * std::log10(signal / noise), 1e-9);
}

}  // namespace
}  // namespace ferry::quant
