// ferry random: a component of true shapes with random weights, for measuring.
#include <ATen/ATen.h>

#include <cmath>
#include <filesystem>

#include "command.h"
#include "ferry/base/error.h"
#include "ferry/base/progress.h"
#include "ferry/base/units.h"
#include "ferry/io/safetensors.h"
#include "ferry/models/config.h"
#include "ferry/models/model.h"
#include "ferry/tensor/dtype.h"
#include "ferry/tensor/generator.h"
#include "presets.h"

namespace ferry::cli {
namespace {

using Json = nlohmann::ordered_json;

struct RandomOptions {
  std::string class_name, config, dtype = "bf16", out;
  uint64_t seed = 0;
  std::optional<uint64_t> shard_bytes;
};

// Standard deviation and mean under which a forward stays finite: matrices keep the scale of what
// passes through them, norms stay near 1, biases small.
std::pair<double, double> deviation_and_mean(const weights::Slot& slot) {
  auto shape = slot.shape();
  if (shape.size() >= 2) {
    double fan_in = 1;
    for (size_t i = 1; i < shape.size(); ++i) fan_in *= static_cast<double>(shape[i]);
    return {1 / std::sqrt(std::max(fan_in, 1.0)), 0.0};
  }
  return {0.02, slot.name().ends_with("bias") ? 0.0 : 1.0};
}

void write_random(io::SafetensorsWriter& writer, const weights::Slot& slot,
                  tensor::Generator& generator, const StopToken& stop,
                  const std::function<void(uint64_t)>& wrote) {
  auto [deviation, mean] = deviation_and_mean(slot);
  constexpr int64_t kChunk = 1 << 20;
  for (int64_t left = slot.tensor.numel(); left > 0; left -= kChunk) {
    stop.throw_if_stopped();
    at::Tensor values = tensor::randn_tensor({std::min(left, kChunk)}, {generator});
    values = values.mul_(deviation).add_(mean).to(slot.dtype());
    writer.write({static_cast<const std::byte*>(values.const_data_ptr()), values.nbytes()});
    wrote(values.nbytes());
  }
}

int run_random(const RandomOptions& options, Context& context) {
  Json config;
  std::string class_name = options.class_name;
  uint64_t shard_bytes = 0;
  const Preset* preset = nullptr;
  for (const Preset& entry : presets()) {
    if (entry.name == options.config) preset = &entry;
  }
  if (preset) {
    config = Json::parse(preset->config);
    shard_bytes = preset->shard_bytes;
    if (class_name != preset->class_name) {
      throw_error<ArgumentError>("preset {} is a {}, not a {}", preset->name, preset->class_name,
                                 class_name);
    }
  } else {
    if (!std::filesystem::exists(options.config)) {
      throw_error<ArgumentError>("--config {}: neither a file nor a preset; presets: {}",
                                 options.config, preset_names());
    }
    config = models::read_config(options.config);
  }
  shard_bytes = options.shard_bytes.value_or(shard_bytes > 0 ? shard_bytes
                                                             : models::Model::kMaxShardSizeBytes);
  at::ScalarType dtype = tensor::parse_dtype(options.dtype);

  auto model = models::make_model(class_name, config, options.config);
  model->to(dtype);
  uint64_t total = weights::total_bytes(weights::collect_slots(*model));
  auto generator = tensor::Generator().manual_seed(options.seed);
  ProgressBar progress("writing MB", total / 1'000'000, {.mode = progress_mode(context)});
  uint64_t written_bytes = 0;
  auto write = [&](const weights::Slot& slot, io::SafetensorsWriter& writer) {
    write_random(writer, slot, generator, context.stop, [&](uint64_t bytes) {
      written_bytes += bytes;
      progress.set(written_bytes / 1'000'000);
    });
  };
  size_t files = model->save_pretrained_from(write, options.out, shard_bytes);
  progress.finish();
  if (!context.quiet) {
    fmt::print("{}: {} {} in {} file{}\n", options.out, class_name, format_bytes(total), files,
               files == 1 ? "" : "s");
  }
  return 0;
}

}  // namespace

Command add_random(CLI::App& app) {
  auto options = std::make_shared<RandomOptions>();
  CLI::App* command =
      app.add_subcommand("random", "Write a component with random weights, for measuring");
  command->footer(
      "Writes a component of true shapes with random normal weights, tensor by tensor, so that a "
      "folder\n"
      "larger than memory can be made. Presets: " +
      preset_names() + ".");
  command->add_option("class", options->class_name, "e.g. FluxTransformer2DModel, T5EncoderModel")
      ->required()
      ->type_name("CLASS");
  command->add_option("--config", options->config, "config.json, or a preset")
      ->required()
      ->type_name("FILE|PRESET");
  command->add_option("--out", options->out, "folder to write")->required()->type_name("DIR");
  command->add_option("--dtype", options->dtype, "fp32, bf16 or fp16")
      ->type_name("DTYPE")
      ->capture_default_str();
  command->add_option("--seed", options->seed, "of the random numbers")
      ->type_name("N")
      ->capture_default_str();
  add_bytes(command, "--max-shard-size", options->shard_bytes, "start a new file above this size");
  return {command, [options](Context& context) { return run_random(*options, context); }};
}

}  // namespace ferry::cli
