#include "ferry/schedulers/trajectory.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>

#include "ferry/base/error.h"

namespace ferry::schedulers {

namespace {

std::vector<double> to_vector(const at::Tensor& tensor) {
  at::Tensor values = tensor.to(at::kCPU, at::kDouble).reshape({-1}).contiguous();
  return {values.const_data_ptr<double>(), values.const_data_ptr<double>() + values.numel()};
}

// Takes `key` out of `json`.
template <class T>
std::optional<T> take(nlohmann::json& json, const char* key) {
  auto it = json.find(key);
  if (it == json.end() || it->is_null()) return std::nullopt;
  try {
    T value = it->get<T>();
    json.erase(it);
    return value;
  } catch (const nlohmann::json::exception&) {
    throw_error<ArgumentError>("argument {}: got {}, expected a number", key, it->dump());
  }
}

}  // namespace

NamedTensors run_trajectory(Scheduler& scheduler, const NamedTensors& inputs,
                            std::optional<int64_t> steps, const nlohmann::json& arguments) {
  static constexpr std::array<const char*, 6> known = {
      "model_outputs", "sample", "noise", "timesteps", "sigmas", "per_token_timesteps"};
  for (const auto& [name, tensor] : inputs) {
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      throw_error<ArgumentError>("unknown input \"{}\"; a schedule takes {}", name,
                                 fmt::join(known, ", "));
    }
  }
  auto input = [&](const char* name) {
    auto it = inputs.find(name);
    return it == inputs.end() ? at::Tensor() : it->second;
  };
  at::Tensor outputs = input("model_outputs"), sample = input("sample"), noise = input("noise");
  at::Tensor per_token = input("per_token_timesteps");
  if (outputs.defined() != sample.defined()) {
    throw_error<ArgumentError>(
        "got the input \"{}\" alone; a trajectory needs \"model_outputs\" [n, ...] and "
        "\"sample\" [...]",
        outputs.defined() ? "model_outputs" : "sample");
  }
  int64_t count = outputs.defined() ? outputs.dim() > 0 ? outputs.size(0) : 0 : 0;
  for (const auto& [name, tensor] :
       {std::pair{"noise", noise}, {"per_token_timesteps", per_token}}) {
    if (tensor.defined() && (tensor.dim() == 0 || tensor.size(0) < count)) {
      throw_error<ArgumentError>(
          "input \"{}\": got {} entries, expected one for each of the {} model outputs", name,
          tensor.dim() == 0 ? 0 : tensor.size(0), count);
    }
  }

  nlohmann::json values = arguments.is_null() ? nlohmann::json::object() : arguments;
  TimestepArguments timestep_arguments;
  timestep_arguments.num_inference_steps = steps;
  timestep_arguments.mu = take<double>(values, "mu");
  std::optional<int64_t> begin_index = take<int64_t>(values, "begin_index");
  std::optional<int64_t> seed = take<int64_t>(values, "seed");
  if (input("timesteps").defined()) timestep_arguments.timesteps = to_vector(input("timesteps"));
  if (input("sigmas").defined()) timestep_arguments.sigmas = to_vector(input("sigmas"));
  if (!steps && !timestep_arguments.timesteps && !timestep_arguments.sigmas && outputs.defined()) {
    timestep_arguments.num_inference_steps = count;
  }
  scheduler.set_timesteps(timestep_arguments);
  if (begin_index) scheduler.set_begin_index(*begin_index);

  NamedTensors result = {
      {"timesteps", scheduler.timesteps()},
      {"sigmas", scheduler.sigmas()},
      {"init_noise_sigma",
       at::scalar_tensor(scheduler.init_noise_sigma(), at::TensorOptions().dtype(at::kFloat))},
  };
  if (!outputs.defined()) return result;

  int64_t first = begin_index.value_or(0);
  if (first < 0 || first + count > scheduler.timesteps().numel()) {
    throw_error<ArgumentError>(
        "input \"model_outputs\": got {} from step {} on, expected at most the {} steps of the "
        "schedule",
        count, first, scheduler.timesteps().numel());
  }
  StepArguments step_arguments;
  step_arguments.values = values;
  if (seed)
    step_arguments.generators = {tensor::Generator().manual_seed(static_cast<uint64_t>(*seed))};
  std::vector<at::Tensor> samples = {sample};
  for (int64_t i = 0; i < count; ++i) {
    if (noise.defined()) step_arguments.noise = noise[i];
    if (per_token.defined()) step_arguments.tensors["per_token_timesteps"] = per_token[i];
    samples.push_back(scheduler.step(outputs[i], scheduler.timesteps()[first + i], samples.back(),
                                     step_arguments));
  }
  result["trajectory"] = at::stack(samples);
  return result;
}

}  // namespace ferry::schedulers
