// Every fixture of tests/fixtures/models against Python's outputs, through the public loading path.
#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "../fixture_tensors.h"
#include "ferry/models/model.h"
#include "ferry/testing/test_device.h"

namespace ferry::models {
namespace {

namespace fs = std::filesystem;

// FERRY_PARITY_MODELS names another folder of references (tools/parity/reference.py).
fs::path fixture_folder() {
  const char* other = std::getenv("FERRY_PARITY_MODELS");
  return other ? other : FERRY_FIXTURES "/models";
}

std::vector<std::string> fixture_names() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(fixture_folder())) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

struct Fixture {
  explicit Fixture(const std::string& name) : folder(fixture_folder() / name) {
    auto args = testing::read_fixture_json((folder / "args.json").string());
    class_name = args["class"];
    method = args["method"];
    arguments = nlohmann::json::parse(args["args"].dump());
    inputs = testing::read_fixture_tensors((folder / "inputs.safetensors").string());
    outputs = testing::read_fixture_tensors((folder / "outputs.safetensors").string());
  }
  fs::path folder;
  std::string class_name, method;
  nlohmann::json arguments;
  NamedTensors inputs, outputs;
};

// On the device that tests are asked to use.
NamedTensors forward(Model& model, const Fixture& fixture, const NamedTensors& inputs) {
  at::Device device = testing::test_device();
  model.to(device);
  return testing::to_device(
      model.forward_named(fixture.method, testing::to_device(inputs, device), fixture.arguments),
      at::kCPU);
}

class Parity : public ::testing::TestWithParam<std::string> {};

TEST_P(Parity, Float32) {
  at::NoGradGuard no_grad;
  Fixture fixture(GetParam());
  auto model = load_model(fixture.folder);
  EXPECT_EQ(model->class_name(), fixture.class_name);
  EXPECT_FALSE(model->weights_loaded());
  NamedTensors got = forward(*model, fixture, fixture.inputs);
  EXPECT_TRUE(model->weights_loaded()) << "the first call loads";
  for (const auto& [name, expected] : fixture.outputs) {
    ASSERT_TRUE(got.contains(name)) << name;
    double error = testing::relative_error(got[name], expected);
    EXPECT_LT(error, 1e-5) << name;
    RecordProperty("error_" + name, fmt::format("{:.2e}", error));
  }
}

TEST_P(Parity, BFloat16) {
  at::NoGradGuard no_grad;
  Fixture fixture(GetParam());
  LoadOptions options;
  options.dtype = at::kBFloat16;
  auto model = load_model(fixture.folder, options);
  EXPECT_EQ(model->dtype(), at::kBFloat16);
  NamedTensors inputs = fixture.inputs;
  for (auto& [name, tensor] : inputs) {
    if (tensor.is_floating_point()) tensor = tensor.to(at::kBFloat16);
  }
  NamedTensors got = forward(*model, fixture, inputs);
  // Python's own bfloat16: its distance from float32 is no yardstick (a guidance of 4220 in
  // bfloat16 is 30% of the output away), the rounding of another CPU is.
  auto half = testing::read_fixture_tensors((fixture.folder / "outputs_bf16.safetensors").string());
  EXPECT_EQ(half.size(), fixture.outputs.size());
  for (const auto& [name, expected] : half) {
    ASSERT_TRUE(got.contains(name)) << name;
    double error = testing::relative_error(got[name], expected);
    EXPECT_LT(error, 0.03) << name;
    RecordProperty("error_" + name, fmt::format("{:.2e}", error));
  }
}

TEST_P(Parity, WithoutWeightsNothingLooksPlausible) {
  at::NoGradGuard no_grad;
  Fixture fixture(GetParam());
  auto config = testing::read_fixture_json((fixture.folder / "config.json").string());
  auto model = make_model(fixture.class_name, config);
  NamedTensors got = model->forward_named(fixture.method, fixture.inputs, fixture.arguments);
  for (const auto& [name, expected] : fixture.outputs) {
    EXPECT_TRUE(got[name].isnan().all().item<bool>()) << name;
  }
}

TEST_P(Parity, SavedAndLoadedIsTheSame) {
  at::NoGradGuard no_grad;
  Fixture fixture(GetParam());
  auto model = load_model(fixture.folder);
  NamedTensors expected = model->forward_named(fixture.method, fixture.inputs, fixture.arguments);
  fs::path folder =
      fs::temp_directory_path() / ("ferry_parity_" + GetParam() + std::to_string(getpid()));
  model->save_pretrained(folder, /*max_shard_size_bytes=*/2000);
  EXPECT_EQ(testing::read_fixture_json((folder / "config.json").string()),
            testing::read_fixture_json((fixture.folder / "config.json").string()));
  NamedTensors got =
      load_model(folder)->forward_named(fixture.method, fixture.inputs, fixture.arguments);
  for (const auto& [name, tensor] : expected) EXPECT_TRUE(at::equal(got[name], tensor)) << name;
  fs::remove_all(folder);
}

INSTANTIATE_TEST_SUITE_P(Fixtures, Parity, ::testing::ValuesIn(fixture_names()),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

}  // namespace
}  // namespace ferry::models
