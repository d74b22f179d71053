#include "ferry/hooks/layerwise_casting.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "../fixture_tensors.h"
#include "ferry/base/error.h"
#include "ferry/hooks/group_offloading.h"
#include "ferry/nn/linear.h"
#include "ferry/testing/model_case.h"

namespace ferry::hooks {
namespace {

using ::testing::HasSubstr;
using testing::ModelCase;

class LayerwiseCasting : public ::testing::TestWithParam<std::string> {
 protected:
  ModelCase model_case() const {
    for (ModelCase& one : testing::cases_in(FERRY_FIXTURES "/models")) {
      if (one.folder.filename() == GetParam()) return one;
    }
    throw_error<Error>("no fixture {}", GetParam());
  }
};

// tools/parity/layerwise_casting.py made the expected outputs with diffusers' own hook.
TEST_P(LayerwiseCasting, ComputesAsPython) {
  auto model = model_case().load();
  ASSERT_GT(model->enable_layerwise_casting(), 0u);
  const auto got = model_case().run(*model);
  const auto expected = testing::read_fixture_tensors(FERRY_FIXTURES "/layerwise_casting/" +
                                                      GetParam() + ".safetensors");
  ASSERT_EQ(got.size(), expected.size());
  for (const auto& [name, tensor] : expected)
    EXPECT_LT(testing::relative_error(got.at(name), tensor), 1e-5) << name;
  EXPECT_EQ(model->dtype(), at::kFloat) << "float8 is how weights are kept, not what computes";
}

TEST_P(LayerwiseCasting, StreamsNarrowWeightsBitForBit) {
  auto resident = model_case().load();
  resident->enable_layerwise_casting();
  const auto expected = model_case().run(*resident);
  auto model = model_case().load();
  model->enable_layerwise_casting();
  offload::EngineOptions options;
  options.small_slot_bytes = 0;
  auto offloading =
      apply_group_offloading(*model, model->binding(), std::make_shared<offload::Engine>(options));
  for (int pass = 0; pass < 2; ++pass) testing::expect_equal(model_case().run(*model), expected);
  try {
    model->enable_layerwise_casting();
    FAIL() << "cast offloaded weights";
  } catch (const ArgumentError& error) {
    EXPECT_THAT(error.what(), HasSubstr("cast first, then offload"));
  }
}

INSTANTIATE_TEST_SUITE_P(Models, LayerwiseCasting,
                         ::testing::Values("FluxTransformer2DModel-0", "AutoencoderKL-0",
                                           "CLIPTextModel-0", "T5EncoderModel-0"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::erase(name, '-');
                           return name;
                         });

TEST(LayerwiseCastingOptions, PatternsDecideWhatStays) {
  auto model = models::load_model(FERRY_FIXTURES "/models/FluxTransformer2DModel-0");
  apply_layerwise_casting(*model, {.skip_modules_pattern = {"^transformer_blocks\\.0", "to_k$"}});
  for (const auto& entry : model->named_modules()) {
    auto* linear = dynamic_cast<nn::Linear*>(entry.value().get());
    if (!linear) continue;
    const bool skipped =
        entry.key().starts_with("transformer_blocks.0") || entry.key().ends_with("to_k");
    EXPECT_EQ(linear->weight.scalar_type(), skipped ? at::kFloat : at::kFloat8_e4m3fn)
        << entry.key();
  }
  EXPECT_THROW(apply_layerwise_casting(*model, {.storage_dtype = at::kHalf}), ArgumentError);
  EXPECT_THROW(apply_layerwise_casting(*model, {.skip_modules_pattern = {"("}}), ArgumentError);
}

}  // namespace
}  // namespace ferry::hooks
