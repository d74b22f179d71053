// Every model through every suite that applies to it, on the committed fixtures.
#include <fstream>

#include "ferry/testing/autoencoder_suites.h"
#include "ferry/testing/memory_suites.h"
#include "ferry/testing/model_suites.h"

namespace ferry::testing {
namespace {

std::vector<ModelCase> cases_of(const std::vector<std::string>& classes) {
  return cases_in(FERRY_FIXTURES "/models", classes);
}

const std::vector<std::string> kAll = {"FluxTransformer2DModel", "AutoencoderKL", "CLIPTextModel",
                                       "CLIPTextModelWithProjection", "T5EncoderModel"};

// All but autoencoders without attention in their middle.
std::vector<ModelCase> cases_with_attention() {
  std::vector<ModelCase> cases = cases_of(kAll);
  std::erase_if(cases, [](const ModelCase& one) {
    nlohmann::json config = nlohmann::json::parse(std::ifstream(one.folder / "config.json"));
    return !config.value("mid_block_add_attention", true);
  });
  return cases;
}

std::vector<AutoencoderCase> autoencoders() {
  std::vector<AutoencoderCase> cases;
  for (const ModelCase& one : cases_of({"AutoencoderKL"})) {
    if (one.method != "encode") continue;  // a fixture of the same model for decode is beside it
    nlohmann::json config = nlohmann::json::parse(std::ifstream(one.folder / "config.json"));
    cases.push_back({.name = one.name,
                     .folder = one.folder,
                     .in_channels = config["in_channels"],
                     .latent_channels = config["latent_channels"]});
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Models, ModelTester, ::testing::ValuesIn(cases_of(kAll)), case_name);
INSTANTIATE_TEST_SUITE_P(Models, MemoryTester, ::testing::ValuesIn(cases_of(kAll)), case_name);
INSTANTIATE_TEST_SUITE_P(Models, AttentionTester, ::testing::ValuesIn(cases_with_attention()),
                         case_name);
INSTANTIATE_TEST_SUITE_P(Models, AutoencoderTester, ::testing::ValuesIn(autoencoders()),
                         [](const auto& info) { return info.param.name; });

TEST(Cases, EveryClassHasFixtures) {
  for (const std::string& name : kAll) EXPECT_GE(cases_of({name}).size(), 2u) << name;
}

}  // namespace
}  // namespace ferry::testing
