#include "ferry/schedulers/scheduling_flow_match_euler_discrete.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/schedulers/beta_distribution.h"

namespace ferry::schedulers {

namespace {

// Far beyond any schedule; more would only be memory.
constexpr int64_t kMostSteps = 1'000'000;

// numpy.linspace, with its order of operations.
std::vector<double> linspace(double start, double stop, int64_t count) {
  std::vector<double> values(count);
  double step = count > 1 ? (stop - start) / static_cast<double>(count - 1) : 0.0;
  for (int64_t i = 0; i < count; ++i) {
    double at = step != 0.0 || count < 2
                    ? static_cast<double>(i) * step
                    : static_cast<double>(i) / static_cast<double>(count - 1) * (stop - start);
    values[i] = at + start;
  }
  if (count > 1) values.back() = stop;
  return values;
}

at::Tensor double_tensor(const std::vector<double>& values) {
  return at::tensor(at::ArrayRef<double>(values), at::TensorOptions().dtype(at::kDouble));
}

// numpy.array(values).astype(float32)
at::Tensor float_tensor(const std::vector<double>& values) {
  return double_tensor(values).to(at::kFloat);
}

double number(const nlohmann::ordered_json& config, const char* key, double otherwise) {
  auto it = config.find(key);
  return it != config.end() && it->is_number() ? it->get<double>() : otherwise;
}

bool is_integer(const at::Tensor& timestep) {
  return timestep.scalar_type() == at::kInt || timestep.scalar_type() == at::kLong;
}

}  // namespace

FlowMatchEulerDiscreteScheduler::FlowMatchEulerDiscreteScheduler(
    FlowMatchEulerDiscreteConfig config)
    : config_(std::move(config)), shift_(config_.shift) {
  if (config_.use_karras_sigmas + config_.use_exponential_sigmas + config_.use_beta_sigmas > 1) {
    throw_error<ArgumentError>(
        "{}: only one of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas can be "
        "set",
        class_name());
  }
  if (config_.time_shift_type != "exponential" && config_.time_shift_type != "linear") {
    throw_error<ArgumentError>(
        "{}: time_shift_type: got \"{}\", expected \"exponential\" or \"linear\"", class_name(),
        config_.time_shift_type);
  }
  int64_t count = config_.num_train_timesteps;
  models::check_size(class_name(), "num_train_timesteps", count, 1, kMostSteps);
  std::vector<double> values = linspace(1.0, static_cast<double>(count), count);
  std::reverse(values.begin(), values.end());
  sigmas_ = float_tensor(values) / count;
  if (!config_.use_dynamic_shifting) sigmas_ = shift_ * sigmas_ / (1 + (shift_ - 1) * sigmas_);
  timesteps_ = sigmas_ * count;
  sigma_min_ = sigmas_[-1].item<double>();
  sigma_max_ = sigmas_[0].item<double>();
}

nlohmann::ordered_json FlowMatchEulerDiscreteScheduler::config_json() const {
  nlohmann::ordered_json json = models::config_to_json(config_);
  json["_class_name"] = class_name();
  return json;
}

at::Tensor FlowMatchEulerDiscreteScheduler::time_shift(double mu, double sigma,
                                                       const at::Tensor& t) const {
  double weight = config_.time_shift_type == "exponential" ? std::exp(mu) : mu;
  return weight / (weight + at::pow(at::ones({}, t.options()) / t - 1, sigma));
}

at::Tensor FlowMatchEulerDiscreteScheduler::stretch_shift_to_terminal(const at::Tensor& t) const {
  at::Tensor one_minus_z = 1 - t;
  at::Tensor scale_factor = one_minus_z[-1] / (1 - config_.shift_terminal.value_or(0.0));
  return 1 - one_minus_z / scale_factor;
}

at::Tensor FlowMatchEulerDiscreteScheduler::convert_sigmas(const at::Tensor& sigmas,
                                                           int64_t steps) const {
  // Python looks for these two in its config, where keys that the class does not know also end up.
  double sigma_min = number(config_.source, "sigma_min", sigmas[-1].item<double>());
  double sigma_max = number(config_.source, "sigma_max", sigmas[0].item<double>());
  std::vector<double> values;
  if (config_.use_karras_sigmas) {
    constexpr double rho = 7.0;  // of the paper, https://arxiv.org/abs/2206.00364
    double min_inv_rho = std::pow(sigma_min, 1 / rho);
    double max_inv_rho = std::pow(sigma_max, 1 / rho);
    values = linspace(0.0, 1.0, steps);
    for (double& value : values)
      value = std::pow(max_inv_rho + value * (min_inv_rho - max_inv_rho), rho);
  } else if (config_.use_exponential_sigmas) {
    values = linspace(std::log(sigma_max), std::log(sigma_min), steps);
    for (double& value : values) value = std::exp(value);
  } else {
    values = linspace(0.0, 1.0, steps);  // https://arxiv.org/abs/2407.12173
    for (double& value : values)
      value = sigma_min + beta_ppf(1.0 - value, 0.6, 0.6) * (sigma_max - sigma_min);
  }
  if (!std::all_of(values.begin(), values.end(),
                   [](double value) { return std::isfinite(value); })) {
    throw_error<ArgumentError>(
        "{}: sigmas from {} to {} cannot be converted to this kind of schedule; both ends have "
        "to be above 0",
        class_name(), sigma_max, sigma_min);
  }
  return double_tensor(values);
}

void FlowMatchEulerDiscreteScheduler::set_timesteps(const TimestepArguments& arguments) {
  const auto& given_sigmas = arguments.sigmas;
  const auto& given_timesteps = arguments.timesteps;
  if (config_.use_dynamic_shifting && !arguments.mu) {
    throw_error<ArgumentError>(
        "{}: set_timesteps: `mu` is needed, since use_dynamic_shifting is set", class_name());
  }
  auto check = [&](const char* name, const std::optional<std::vector<double>>& values,
                   size_t expected) {
    if (values && values->size() != expected) {
      throw_error<ArgumentError>(
          "{}: set_timesteps: {}: got {} values, expected {}; sigmas, timesteps and "
          "num_inference_steps have to agree",
          class_name(), name, values->size(), expected);
    }
  };
  if (!given_sigmas && !given_timesteps && !arguments.num_inference_steps) {
    throw_error<ArgumentError>(
        "{}: set_timesteps: one of num_inference_steps, sigmas and timesteps is needed",
        class_name());
  }
  int64_t steps = given_sigmas      ? static_cast<int64_t>(given_sigmas->size())
                  : given_timesteps ? static_cast<int64_t>(given_timesteps->size())
                                    : *arguments.num_inference_steps;
  if (arguments.num_inference_steps && *arguments.num_inference_steps >= 0)
    steps = *arguments.num_inference_steps;
  check("sigmas", given_sigmas, steps);
  check("timesteps", given_timesteps, steps);
  models::check_size(class_name(), "set_timesteps: steps", steps, 1, kMostSteps);

  // Python computes in numpy here: in float64, or in float32 from given values. So do these
  // tensors.
  at::Tensor timesteps;
  if (given_timesteps) timesteps = float_tensor(*given_timesteps);
  at::Tensor sigmas;
  if (given_sigmas) {
    sigmas = float_tensor(*given_sigmas);
  } else if (given_timesteps) {
    log::warn(
        "{}: timesteps were passed without sigmas: they are used as given, while the sigmas that "
        "follow from "
        "them are shifted, so the two may not agree",
        class_name());
    sigmas = timesteps / config_.num_train_timesteps;
  } else {
    double count = static_cast<double>(config_.num_train_timesteps);
    sigmas = double_tensor(linspace(sigma_max_ * count, sigma_min_ * count, steps)) /
             config_.num_train_timesteps;
  }

  sigmas = config_.use_dynamic_shifting ? time_shift(*arguments.mu, 1.0, sigmas)
                                        : shift_ * sigmas / (1 + (shift_ - 1) * sigmas);
  if (config_.shift_terminal.value_or(0.0) != 0.0) sigmas = stretch_shift_to_terminal(sigmas);
  if (config_.use_karras_sigmas || config_.use_exponential_sigmas || config_.use_beta_sigmas) {
    sigmas = convert_sigmas(sigmas, steps);
  }

  sigmas = sigmas.to(at::kFloat);
  if (!given_timesteps) timesteps = sigmas * config_.num_train_timesteps;
  if (config_.invert_sigmas) {
    sigmas = 1.0 - sigmas;
    timesteps = sigmas * config_.num_train_timesteps;
  }
  at::Tensor last = config_.invert_sigmas ? at::ones({1}) : at::zeros({1});
  sigmas_ = at::cat({sigmas, last}).to(arguments.device);
  timesteps_ = timesteps.to(arguments.device);
  step_index_.reset();
  begin_index_.reset();
}

int64_t FlowMatchEulerDiscreteScheduler::index_for_timestep(const at::Tensor& timestep) const {
  at::Tensor found = (timesteps_ == timestep.to(timesteps_.device())).nonzero();
  if (found.size(0) == 0) {
    throw_error<ArgumentError>(
        "{}: timestep {} is none of the {} timesteps; pass one of timesteps()", class_name(),
        timestep.numel() == 1 ? fmt::format("{}", timestep.item<double>()) : "(a tensor)",
        timesteps_.numel());
  }
  return found[found.size(0) > 1 ? 1 : 0].item<int64_t>();
}

at::Tensor FlowMatchEulerDiscreteScheduler::scale_noise(const at::Tensor& sample,
                                                        const at::Tensor& timestep,
                                                        const at::Tensor& noise) {
  at::Tensor each = timestep.reshape({-1});
  std::vector<int64_t> indices;
  for (int64_t i = 0; i < each.numel(); ++i) {
    indices.push_back(!begin_index_ ? index_for_timestep(each[i])
                                    : step_index_.value_or(*begin_index_));
    if (indices.back() >= sigmas_.numel()) {
      throw_error<ArgumentError>("{}: scale_noise: step {} lies past the {} sigmas", class_name(),
                                 indices.back(), sigmas_.numel());
    }
  }
  at::Tensor sigma = sigmas_.to(sample.device(), sample.scalar_type());
  sigma = sigma.index_select(
      0, at::tensor(indices, at::TensorOptions().dtype(at::kLong)).to(sample.device()));
  while (sigma.dim() < sample.dim()) sigma = sigma.unsqueeze(-1);
  return sigma * noise + (1.0 - sigma) * sample;
}

at::Tensor FlowMatchEulerDiscreteScheduler::step(const at::Tensor& model_output,
                                                 const at::Tensor& timestep,
                                                 const at::Tensor& sample,
                                                 const StepArguments& arguments) {
  static constexpr std::array<std::string_view, 4> known = {"s_churn", "s_tmin", "s_tmax",
                                                            "s_noise"};
  for (const auto& [name, value] : arguments.values.items()) {
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      throw_error<ArgumentError>("{}: step: unknown argument \"{}\"; known: {}", class_name(), name,
                                 fmt::join(known, ", "));
    }
  }
  at::Tensor per_token_timesteps;
  for (const auto& [name, value] : arguments.tensors) {
    if (name != "per_token_timesteps") {
      throw_error<ArgumentError>("{}: step: unknown tensor \"{}\"; known: per_token_timesteps",
                                 class_name(), name);
    }
    per_token_timesteps = value;
  }
  if (is_integer(timestep)) {
    throw_error<ArgumentError>(
        "{}: step: got a timestep of an integer type; pass one of timesteps(), not its index",
        class_name());
  }
  if (!step_index_) step_index_ = begin_index_ ? *begin_index_ : index_for_timestep(timestep);
  if (*step_index_ + 1 >= sigmas_.numel()) {
    throw_error<ArgumentError>(
        "{}: step: step {} of a schedule of {}; call set_timesteps() before the next run",
        class_name(), *step_index_ + 1, sigmas_.numel() - 1);
  }

  at::Tensor x = sample.to(at::kFloat);
  at::Tensor current_sigma, next_sigma, dt;
  if (per_token_timesteps.defined()) {
    at::Tensor per_token_sigmas = per_token_timesteps / config_.num_train_timesteps;
    at::Tensor sigmas = sigmas_.reshape({-1, 1, 1});  // [steps + 1, 1, 1]
    at::Tensor lower = (sigmas < per_token_sigmas.unsqueeze(0) - 1e-6) * sigmas;
    current_sigma = per_token_sigmas.unsqueeze(-1);  // [batch, tokens, 1]
    next_sigma = lower.amax(0).unsqueeze(-1);
    dt = current_sigma - next_sigma;
  } else {
    // Tensors without dimensions: in a product with the model output they take its dtype.
    current_sigma = sigmas_[*step_index_];
    next_sigma = sigmas_[*step_index_ + 1];
    dt = next_sigma - current_sigma;
  }

  at::Tensor previous;
  if (config_.stochastic_sampling) {
    at::Tensor x0 = x - current_sigma * model_output;
    at::Tensor noise = arguments.noise ? *arguments.noise
                                       : tensor::randn_tensor(x.sizes(), arguments.generators,
                                                              x.scalar_type(), x.device());
    previous = (1.0 - next_sigma) * x0 + next_sigma * noise;
  } else {
    previous = x + dt * model_output;
  }
  ++*step_index_;
  return per_token_timesteps.defined() ? previous : previous.to(model_output.scalar_type());
}

}  // namespace ferry::schedulers
