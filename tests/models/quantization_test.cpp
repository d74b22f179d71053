// Every model through the quantization suite, in every scheme, on the committed fixtures.
#include "ferry/testing/quantization_suites.h"

namespace ferry::testing {
namespace {

INSTANTIATE_TEST_SUITE_P(Models, QuantizationTester,
                         ::testing::Combine(::testing::ValuesIn(one_of_each_class(FERRY_FIXTURES
                                                                                  "/models")),
                                            ::testing::ValuesIn(scheme_cases())),
                         quantization_case_name);

TEST(QuantizationCases, EverySchemeIsTried) {
  for (const quant::Scheme& scheme : quant::schemes()) {
    EXPECT_TRUE(std::any_of(scheme_cases().begin(), scheme_cases().end(),
                            [&](const SchemeCase& one) { return one.scheme == scheme.name; }))
        << scheme.name;
  }
}

}  // namespace
}  // namespace ferry::testing
