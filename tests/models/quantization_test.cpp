// Every model through the quantization suite, in every scheme, on the committed fixtures.
#include "ferry/testing/quantization_suites.h"

namespace ferry::testing {
namespace {

// Scheme, group size; bits a value, and bytes a row, group and weight of float32; the ratios of
// signal to noise that its arithmetic gives normal weights (about 6 dB a bit, less what the row's
// peak costs) and that a tiny model's output keeps of them.
const std::vector<SchemeCase> kSchemes = {
    {"int8wo", 0, 8, 5, 0, 0, 35, 25}, {"int8da8w", 0, 8, 5, 0, 0, 35, 20},
    {"fp8wo", 0, 8, 4, 0, 0, 25, 20},  {"fp8da8w", 0, 8, 4, 0, 0, 25, 15},
    {"int4wo", 8, 4, 0, 8, 0, 15, 8},  {"nf4", 64, 4, 0, 4, 64, 15, 8},
};

std::vector<ModelCase> cases() {
  std::vector<ModelCase> all = cases_in(FERRY_FIXTURES "/models");
  // One of each class tells what the others would.
  std::vector<ModelCase> first;
  for (ModelCase& one : all) {
    if (one.name.ends_with("0")) first.push_back(std::move(one));
  }
  return first;
}

INSTANTIATE_TEST_SUITE_P(Models, QuantizationTester,
                         ::testing::Combine(::testing::ValuesIn(cases()),
                                            ::testing::ValuesIn(kSchemes)),
                         [](const auto& info) {
                           return std::get<0>(info.param).name + "_" +
                                  std::get<1>(info.param).scheme;
                         });

TEST(QuantizationCases, EverySchemeIsTried) {
  for (const quant::Scheme& scheme : quant::schemes()) {
    EXPECT_TRUE(std::any_of(kSchemes.begin(), kSchemes.end(), [&](const SchemeCase& one) {
      return one.scheme == scheme.name;
    })) << scheme.name;
  }
}

}  // namespace
}  // namespace ferry::testing
