// What a suite needs to know of a model: a folder with weights, inputs and a method. A new model's
// test is a list of cases and INSTANTIATE_TEST_SUITE_P for each suite that applies.
#pragma once

#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>

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
