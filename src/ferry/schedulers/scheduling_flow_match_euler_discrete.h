// Euler's method for flow matching models: diffusers' FlowMatchEulerDiscreteScheduler (0.42.1).
#pragma once

#include <optional>
#include <string>

#include "ferry/models/config.h"
#include "ferry/schedulers/scheduler.h"

namespace ferry::schedulers {

struct FlowMatchEulerDiscreteConfig : models::ConfigBase {
  int64_t num_train_timesteps = 1000;
  double shift = 1.0;
  // Shift by `mu` of set_timesteps(), which depends on the resolution, instead of by `shift`.
  bool use_dynamic_shifting = false;
  std::optional<double> base_shift = 0.5;
  std::optional<double> max_shift = 1.15;
  int64_t base_image_seq_len = 256;
  int64_t max_image_seq_len = 4096;
  bool invert_sigmas = false;
  // Where the shifted schedule ends; unset or 0 leaves it.
  std::optional<double> shift_terminal;
  bool use_karras_sigmas = false;
  bool use_exponential_sigmas = false;
  bool use_beta_sigmas = false;
  // "exponential" or "linear".
  std::string time_shift_type = "exponential";
  bool stochastic_sampling = false;

  template <class V>
  void fields(V& v) {
    v("num_train_timesteps", num_train_timesteps);
    v("shift", shift);
    v("use_dynamic_shifting", use_dynamic_shifting);
    v("base_shift", base_shift);
    v("max_shift", max_shift);
    v("base_image_seq_len", base_image_seq_len);
    v("max_image_seq_len", max_image_seq_len);
    v("invert_sigmas", invert_sigmas);
    v("shift_terminal", shift_terminal);
    v("use_karras_sigmas", use_karras_sigmas);
    v("use_exponential_sigmas", use_exponential_sigmas);
    v("use_beta_sigmas", use_beta_sigmas);
    v("time_shift_type", time_shift_type);
    v("stochastic_sampling", stochastic_sampling);
  }
};

class FlowMatchEulerDiscreteScheduler : public Scheduler {
 public:
  // Throws ArgumentError for more than one of karras, exponential and beta sigmas, and for an
  // unknown time_shift_type.
  explicit FlowMatchEulerDiscreteScheduler(FlowMatchEulerDiscreteConfig config = {});

  std::string class_name() const override { return "FlowMatchEulerDiscreteScheduler"; }
  nlohmann::ordered_json config_json() const override;
  const FlowMatchEulerDiscreteConfig& config() const { return config_; }

  // `sigmas` are shifted; `timesteps` are taken as given, and without sigmas these follow from
  // them.
  void set_timesteps(const TimestepArguments& arguments) override;
  // Tensors: per_token_timesteps ([batch, tokens], then sample is [batch, tokens, channels] and
  // stays float32). Values: s_churn, s_tmin, s_tmax, s_noise, which have no effect, as in Python.
  // Otherwise the result has the model output's dtype; it is computed in float32.
  at::Tensor step(const at::Tensor& model_output, const at::Tensor& timestep,
                  const at::Tensor& sample, const StepArguments& arguments = {}) override;
  at::Tensor scale_noise(const at::Tensor& sample, const at::Tensor& timestep,
                         const at::Tensor& noise) override;

  const at::Tensor& timesteps() const override { return timesteps_; }
  const at::Tensor& sigmas() const override { return sigmas_; }
  int64_t num_train_timesteps() const override { return config_.num_train_timesteps; }
  std::optional<int64_t> step_index() const override { return step_index_; }
  std::optional<int64_t> begin_index() const override { return begin_index_; }
  void set_begin_index(int64_t begin_index) override { begin_index_ = begin_index; }

  double shift() const { return shift_; }
  void set_shift(double shift) { shift_ = shift; }
  double sigma_min() const { return sigma_min_; }
  double sigma_max() const { return sigma_max_; }

  // Where `timestep` lies in timesteps(); of several, the second, so that sampling that starts in
  // the middle skips no sigma. Throws ArgumentError if it is not there. Waits for the device.
  int64_t index_for_timestep(const at::Tensor& timestep) const;
  // exp(mu) / (exp(mu) + (1/t - 1)^sigma), or the same with mu for exp(mu) where shifting is
  // linear.
  at::Tensor time_shift(double mu, double sigma, const at::Tensor& t) const;
  // Stretches the schedule so that it ends at shift_terminal.
  at::Tensor stretch_shift_to_terminal(const at::Tensor& t) const;

 private:
  // A schedule of another kind between the ends of `sigmas`, float64 [steps].
  at::Tensor convert_sigmas(const at::Tensor& sigmas, int64_t steps) const;

  FlowMatchEulerDiscreteConfig config_;
  double shift_;
  at::Tensor timesteps_;
  at::Tensor sigmas_;
  double sigma_min_ = 0.0;
  double sigma_max_ = 1.0;
  std::optional<int64_t> step_index_;
  std::optional<int64_t> begin_index_;
};

}  // namespace ferry::schedulers
