// ferry plan: how a model would run under a budget, here or on hardware that is not here.
#include <fmt/format.h>

#include <memory>

#include "command.h"
#include "ferry/base/error.h"
#include "ferry/base/units.h"
#include "ferry/io/atomic_file.h"
#include "ferry/offload/timeline.h"
#include "ferry/pipelines/plan_components.h"
#include "plan_report.h"
#include "presets.h"

namespace ferry::cli {
namespace {

struct PlanCommandOptions {
  std::string folder, preset, hardware = "cpu-2core-amx", svg;
  std::optional<uint64_t> memory, weights_memory, host_memory;
  int64_t width = 1024, height = 1024, text_tokens = 512;
  int steps = 28;
  bool json = false, packs = false;
};

int run_plan(const PlanCommandOptions& options, Context&) {
  if (options.folder.empty() == options.preset.empty())
    throw_error<ArgumentError>("plan: give a folder or --preset NAME; presets: {}", preset_names());
  if (options.memory && options.weights_memory) {
    throw_error<ArgumentError>(
        "plan: --memory and --weights-memory exclude each other: the first is all that may be "
        "held, the second the weights' part of it");
  }
  check_writable_parent(options.svg);
  PlanRequest request;
  request.hardware = offload::parse_hardware(options.hardware);
  request.workload.width = options.width;
  request.workload.height = options.height;
  request.workload.text_tokens = options.text_tokens;
  request.steps = options.steps;
  request.memory_bytes = options.memory;
  request.weights_memory_bytes = options.weights_memory;
  request.host_memory_bytes = options.host_memory.value_or(0);
  request.packs = options.packs;
  if (!options.memory && !options.weights_memory) {
    if (request.hardware.memory_bytes == 0) {
      throw_error<ArgumentError>("plan: give --memory: {} states none", request.hardware.name);
    }
    request.memory_bytes = request.hardware.memory_bytes;
  }

  std::vector<PlannedComponent> components =
      options.preset.empty() ? pipelines::components_of_folder(options.folder, request)
                             : components_of_preset(options.preset, request);
  pipelines::plan_components(components, request);
  const std::vector<NextGiB> next = pipelines::next_gib(components, request);
  const std::string title = options.preset.empty() ? options.folder : options.preset;
  if (!options.svg.empty()) {
    const PlannedComponent& main = pipelines::main_component(components);
    const offload::Simulation simulation =
        offload::simulate(main.groups, main.options, main.plan, {.record = true});
    const bool steady = main.passes > 1;
    io::write_file(
        options.svg,
        offload::draw_svg(
            steady ? simulation.spans : simulation.first_spans,
            steady ? simulation.prediction.step_s : simulation.prediction.first_step_s, main.groups,
            main.plan,
            fmt::format("{}: one step of {} on {}", title, main.name, request.hardware.name)));
  }
  if (options.json) {
    fmt::print("{}\n", plan_json(components, request, next).dump(2));
  } else {
    fmt::print("{}", plan_text(title, components, request, next));
  }
  return 0;
}

}  // namespace

Command add_plan(CLI::App& app) {
  auto options = std::make_shared<PlanCommandOptions>();
  CLI::App* command =
      app.add_subcommand("plan", "Predict memory and time under a budget, also for other hardware");
  std::string machines;
  for (const offload::Hardware& hardware : offload::hardware_presets())
    machines += fmt::format("\n  {:<14} {}", hardware.name, hardware.description);
  command->footer(
      "Says which weights stay, which are streamed and from where, what a step takes and what "
      "limits it.\n"
      "Reads headers only; with --preset not even those. Machines, with \",nvme-7\", \",nvme-3.5\" "
      "or \",sata\"\nbehind the name for another disk:" +
      machines + "\nPresets: " + preset_names() + ".");
  command->add_option("path", options->folder, "pipeline or component folder, or org/repo")
      ->type_name("DIR");
  command->add_option("--preset", options->preset, "shapes of a published model, without weights")
      ->type_name("NAME");
  add_bytes(command, "--memory", options->memory,
            "all that may be held where compute happens [default: all the hardware has]");
  add_bytes(command, "--weights-memory", options->weights_memory, "the weights' part alone");
  add_bytes(command, "--host-memory", options->host_memory,
            "pinned host memory, for weights that wait there [default: none but staging]");
  command->add_option("--hardware", options->hardware, "machine to plan for, or a JSON file")
      ->type_name("PRESET|FILE")
      ->capture_default_str();
  auto positive = CLI::PositiveNumber;
  command->add_option("--width", options->width, "pixels")->check(positive)->capture_default_str();
  command->add_option("--height", options->height, "pixels")
      ->check(positive)
      ->capture_default_str();
  command->add_option("--text-tokens", options->text_tokens, "of the long text encoder")
      ->check(positive)
      ->capture_default_str();
  command->add_option("--steps", options->steps, "of the denoiser")
      ->check(positive)
      ->capture_default_str();
  command->add_flag("--packs", options->packs, "lossless packs of the weights may be made");
  command->add_flag("--json", options->json, "print JSON");
  command->add_option("--svg", options->svg, "also draw one step into this file")
      ->type_name("FILE");
  return {command, [options](Context& context) { return run_plan(*options, context); }};
}

}  // namespace ferry::cli
