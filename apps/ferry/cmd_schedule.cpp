// ferry schedule: a scheduler's timesteps and a whole trajectory with given model outputs.
#include <ATen/core/grad_mode.h>

#include "command.h"
#include "ferry/schedulers/trajectory.h"
#include "tensor_file.h"

namespace ferry::cli {

Command add_schedule(CLI::App& app) {
  struct Options {
    std::string config, inputs, output, class_name;
    std::optional<int64_t> steps;
    std::vector<std::string> arguments;
  };
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("schedule", "Run a scheduler's steps on given model outputs");
  command->footer(
      "Runs set_timesteps and a whole trajectory of steps with given model outputs.\n"
      "Inputs: model_outputs [n, ...], sample, optional noise [n, ...], timesteps [n] or sigmas "
      "[n].\n"
      "Outputs: timesteps, sigmas, init_noise_sigma, trajectory [n+1, ...] (the sample first).");
  command->add_option("config", options->config, "scheduler_config.json")
      ->required()
      ->type_name("CONFIG.json");
  add_tensor_files(command, options->inputs, options->output);
  command->add_option("--steps", options->steps, "num_inference_steps")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  command
      ->add_option("--class", options->class_name,
                   "the scheduler's class [default: _class_name of CONFIG.json]")
      ->type_name("CLASS");
  command
      ->add_option("--arg", options->arguments,
                   "argument of set_timesteps or step (mu=0.8, s_churn=1), repeatable")
      ->type_name("NAME=VALUE");
  return {command, [options](Context& context) {
            check_writable_parent(options->output);
            at::NoGradGuard no_grad;
            auto scheduler = schedulers::load_scheduler(options->config, options->class_name);
            auto outputs =
                schedulers::run_trajectory(*scheduler, load_tensors(options->inputs),
                                           options->steps, parse_arguments(options->arguments));
            save_tensors(options->output, outputs);
            return 0;
          }};
}

}  // namespace ferry::cli
