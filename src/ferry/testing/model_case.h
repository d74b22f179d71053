// What a suite needs to know of a model: a folder with weights, inputs and a method. A new model's
// test is a list of cases and INSTANTIATE_TEST_SUITE_P for each suite that applies.
#pragma once

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>
#include <vector>

#include "ferry/models/cast_inputs.h"
#include "ferry/models/model.h"
#include "ferry/testing/test_device.h"
#include "ferry/weights/checkpoint.h"

namespace ferry::testing {

struct ModelCase {
  std::string name;              // letters and digits: part of the test's name
  std::filesystem::path folder;  // config.json and weights
  std::filesystem::path inputs;  // safetensors, named as the forward's arguments
  std::string method = "forward";
  nlohmann::json arguments = nlohmann::json::object();

  models::NamedTensors read_inputs(std::optional<at::ScalarType> dtype = {}) const {
    models::NamedTensors tensors;
    auto checkpoint = weights::Checkpoint::open_file(inputs);
    for (const auto& stored : checkpoint->tensors())
      tensors[stored.key] = weights::read_stored(stored);
    if (dtype) models::cast_inputs(tensors, *dtype);
    return tensors;
  }
  // On test_device().
  std::shared_ptr<models::Model> load(const models::LoadOptions& options = {}) const {
    auto model = models::load_model(folder, options);
    model->to(test_device());
    return model;
  }
  // Inputs go to the model's device, outputs come back.
  models::NamedTensors run(models::Model& model) const {
    at::NoGradGuard no_grad;
    auto inputs = to_device(read_inputs(model.dtype()), model.device());
    return to_device(model.forward_named(method, inputs, arguments), at::kCPU);
  }

  friend void PrintTo(const ModelCase& value, std::ostream* out) { *out << value.name; }
};

inline std::string case_name(const ::testing::TestParamInfo<ModelCase>& info) {
  return info.param.name;
}

// Every "<class>-<k>" below `folder`, by name: each has config.json, weights, inputs.safetensors
// and args.json. `classes` empty: of all classes.
inline std::vector<ModelCase> cases_in(const std::filesystem::path& folder,
                                       const std::vector<std::string>& classes = {}) {
  std::vector<ModelCase> cases;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    const std::string of_class = name.substr(0, name.rfind('-'));
    if (!classes.empty() && std::find(classes.begin(), classes.end(), of_class) == classes.end())
      continue;
    ModelCase one{
        .name = name, .folder = entry.path(), .inputs = entry.path() / "inputs.safetensors"};
    std::erase(one.name, '-');
    auto arguments = nlohmann::json::parse(std::ifstream(entry.path() / "args.json"));
    one.method = arguments.value("method", "forward");
    one.arguments = arguments.value("args", nlohmann::json::object());
    cases.push_back(std::move(one));
  }
  std::sort(cases.begin(), cases.end(),
            [](const ModelCase& a, const ModelCase& b) { return a.name < b.name; });
  return cases;
}

inline void expect_equal(const models::NamedTensors& got, const models::NamedTensors& expected,
                         const std::string& when = "") {
  ASSERT_EQ(got.size(), expected.size()) << when;
  for (const auto& [name, tensor] : expected) {
    ASSERT_TRUE(got.contains(name)) << name << when;
    const at::Tensor& other = got.at(name);
    if (at::equal(other, tensor)) continue;
    ADD_FAILURE() << name << when << ": differs"
                  << (other.sizes() == tensor.sizes()
                          ? fmt::format(" by at most {}",
                                        (other - tensor).abs().max().item<double>())
                          : " in shape");
  }
}

// A folder below the system's temporary folder, removed at the end.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    static std::atomic<int> count = 0;
    path_ = std::filesystem::temp_directory_path() /
            ("ferry-suite-" + std::to_string(::getpid()) + "-" + std::to_string(count++));
    std::filesystem::create_directories(path_);
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace ferry::testing
