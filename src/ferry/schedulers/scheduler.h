// What every scheduler is (diffusers' SchedulerMixin): a noise schedule and the step along it.
#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "ferry/tensor/generator.h"

namespace ferry::schedulers {

// The arguments of set_timesteps(), under their Python names. A scheduler throws ArgumentError for
// one that it does not take.
struct TimestepArguments {
  std::optional<int64_t> num_inference_steps = std::nullopt;
  std::optional<std::vector<double>> timesteps = std::nullopt;
  std::optional<std::vector<double>> sigmas = std::nullopt;
  std::optional<double> mu = std::nullopt;
  // Where the timesteps and sigmas go.
  at::Device device = at::Device(at::kCPU);
};

// The arguments of step() besides model output, timestep and sample.
struct StepArguments {
  // For schedulers that add noise: one, or one for each sample of the batch; none is torch's
  // default.
  std::vector<tensor::Generator> generators = {};
  // Taken instead of drawn noise: the shape of the sample.
  std::optional<at::Tensor> noise = std::nullopt;
  // Arguments that are tensors (per_token_timesteps) and numbers (s_churn, eta), by Python name.
  std::map<std::string, at::Tensor> tensors = {};
  nlohmann::json values = nlohmann::json::object();
};

// Ownership: holds the small tensors of its schedule. Not thread-safe: one generation at a time.
class Scheduler {
 public:
  virtual ~Scheduler() = default;

  virtual std::string class_name() const = 0;
  // The configuration with `_class_name` and all keys that came with the file.
  virtual nlohmann::ordered_json config_json() const = 0;

  // Throws ArgumentError for arguments that contradict each other or that the scheduler lacks.
  virtual void set_timesteps(const TimestepArguments& arguments) = 0;
  // One step back along the schedule: the sample at the next timestep. `timestep` is one of
  // timesteps(), `model_output` and `sample` have one shape, [batch, ...].
  virtual at::Tensor step(const at::Tensor& model_output, const at::Tensor& timestep,
                          const at::Tensor& sample, const StepArguments& arguments = {}) = 0;
  // The forward process: `sample` with `noise` for the timesteps ([batch]).
  virtual at::Tensor scale_noise(const at::Tensor& sample, const at::Tensor& timestep,
                                 const at::Tensor& noise) = 0;

  // float32 [steps], on the device of set_timesteps().
  virtual const at::Tensor& timesteps() const = 0;
  // float32 [steps + 1].
  virtual const at::Tensor& sigmas() const = 0;
  // Standard deviation of the noise that sampling starts from.
  virtual double init_noise_sigma() const { return 1.0; }
  // Model evaluations a step (1 for first-order schedulers).
  virtual int64_t order() const { return 1; }
  virtual int64_t num_train_timesteps() const = 0;

  // Which step comes next; unset until the first step() after set_timesteps().
  virtual std::optional<int64_t> step_index() const = 0;
  // Where in the schedule sampling begins (image to image); pipelines set it so that step() need
  // not look for the timestep. set_timesteps() unsets it.
  virtual std::optional<int64_t> begin_index() const = 0;
  virtual void set_begin_index(int64_t begin_index) = 0;

  // Writes `folder`/scheduler_config.json. Throws IoError.
  void save_pretrained(const std::filesystem::path& folder) const;
};

// The registry: an explicit table in scheduler.cpp, a line a class.
struct SchedulerClass {
  std::string_view name;
  std::function<std::unique_ptr<Scheduler>(const nlohmann::ordered_json& config,
                                           const std::string& where)>
      make;
};
const std::vector<SchedulerClass>& scheduler_classes();

// Throws ArgumentError (a class ferry does not have, naming those it has), FormatError (a bad
// config).
std::unique_ptr<Scheduler> make_scheduler(const std::string& class_name,
                                          const nlohmann::ordered_json& config,
                                          const std::string& where = "config");

// Reads scheduler_config.json of a folder, or the file itself. `class_name` overrides
// `_class_name`. Throws as make_scheduler(), and IoError.
std::unique_ptr<Scheduler> load_scheduler(const std::filesystem::path& folder_or_file,
                                          const std::string& class_name = "");

}  // namespace ferry::schedulers
