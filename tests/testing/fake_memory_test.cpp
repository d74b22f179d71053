// MemoryTester on the fake accelerator: every model of the fixtures, offloaded to it.
#include <cstdlib>

#include "ferry/testing/fake_accelerator.h"
#include "ferry/testing/memory_suites.h"
#include "ferry/testing/quantization_suites.h"

namespace ferry::testing {
namespace {

// Before the suites ask for the device.
class OnTheFake : public ::testing::Environment {
 public:
  void SetUp() override {
    // The choice for CPUs without bfloat16 is not made for devices.
    ::setenv("FERRY_LINEAR_KERNEL", "native", /*overwrite=*/0);
    ::setenv("FERRY_TEST_DEVICE", FakeAccelerator::install().str().c_str(), /*overwrite=*/1);
    ASSERT_EQ(test_device(), FakeAccelerator::device());
  }
  void TearDown() override { FakeAccelerator::drain(); }
};
const auto* const kEnvironment = ::testing::AddGlobalTestEnvironment(new OnTheFake);

INSTANTIATE_TEST_SUITE_P(Fake, MemoryTester,
                         ::testing::ValuesIn(cases_in(FERRY_FIXTURES "/models")), case_name);
INSTANTIATE_TEST_SUITE_P(Fake, QuantizationTester,
                         ::testing::Combine(::testing::ValuesIn(one_of_each_class(FERRY_FIXTURES
                                                                                  "/models")),
                                            ::testing::ValuesIn(scheme_cases())),
                         quantization_case_name);

}  // namespace
}  // namespace ferry::testing
