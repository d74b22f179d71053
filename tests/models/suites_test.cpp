// Every model through every suite that applies to it, on the committed fixtures.
#include <fstream>

#include "ferry/testing/autoencoder_suites.h"
#include "ferry/testing/model_suites.h"

namespace ferry::testing {
namespace {

// The fixtures of a class: folders "<class>-<k>" with weights, inputs.safetensors and args.json.
std::vector<ModelCase> cases_of(const std::vector<std::string>& classes) {
  std::vector<ModelCase> cases;
  for (const std::string& name : classes) {
    for (const auto& entry : std::filesystem::directory_iterator(FERRY_FIXTURES "/models")) {
      const std::string folder = entry.path().filename().string();
      if (folder.substr(0, folder.rfind('-')) != name) continue;
      ModelCase one{
          .name = folder, .folder = entry.path(), .inputs = entry.path() / "inputs.safetensors"};
      std::erase(one.name, '-');
      nlohmann::json arguments = nlohmann::json::parse(std::ifstream(entry.path() / "args.json"));
      one.method = arguments.value("method", "forward");
      one.arguments = arguments.value("args", nlohmann::json::object());
      cases.push_back(std::move(one));
    }
  }
  std::sort(cases.begin(), cases.end(),
            [](const ModelCase& a, const ModelCase& b) { return a.name < b.name; });
  return cases;
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
