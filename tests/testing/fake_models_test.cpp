// Whole models on the fake accelerator: moved after loading, they give what they give on the CPU,
// bit for bit, and never make the host wait.
#include <ATen/ATen.h>
#include <ATen/DeviceAccelerator.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "ferry/testing/fake_accelerator.h"
#include "ferry/testing/model_case.h"

namespace ferry::testing {
namespace {

class FakeModelsTest
    : public ::testing::TestWithParam<std::tuple<ModelCase, std::optional<at::ScalarType>>> {};

TEST_P(FakeModelsTest, EqualsTheCpuBitForBit) {
  // What is chosen by CPU is not for devices.
  ::setenv("FERRY_LINEAR_KERNEL", "native", /*overwrite=*/0);
  const at::Device device = FakeAccelerator::install();
  const auto& [one, dtype] = GetParam();
  auto model = one.load({.dtype = dtype, .load_now = true});
  models::NamedTensors expected = one.run(*model);
  model->to(device);
  EXPECT_EQ(model->device(), device);

  models::NamedTensors inputs = one.read_inputs(model->dtype());
  for (auto& [name, tensor] : inputs) tensor = tensor.to(device);
  FakeAccelerator::drain();
  FakeAccelerator::reset_counters();
  at::NoGradGuard no_grad;
  models::NamedTensors got = model->forward_named(one.method, inputs, one.arguments);
  for (const std::string& why : FakeAccelerator::counters().host_synchronizations)
    ADD_FAILURE() << "the host waited for " << why;
  ASSERT_EQ(got.size(), expected.size());
  for (const auto& [name, tensor] : expected) {
    ASSERT_TRUE(got.contains(name)) << name;
    EXPECT_EQ(got.at(name).device(), device) << name;
    EXPECT_TRUE(at::equal(got.at(name).to(at::kCPU), tensor)) << name;
  }
}

std::string name_of(const ::testing::TestParamInfo<FakeModelsTest::ParamType>& info) {
  const auto& [one, dtype] = info.param;
  return one.name + (dtype ? "_bfloat16" : "");
}

INSTANTIATE_TEST_SUITE_P(Fixtures, FakeModelsTest,
                         ::testing::Combine(::testing::ValuesIn(cases_in(FERRY_FIXTURES "/models")),
                                            ::testing::Values(std::optional<at::ScalarType>(),
                                                              at::kBFloat16)),
                         name_of);

}  // namespace
}  // namespace ferry::testing
