// ferry random: a component of true shapes with random weights, for measuring.
#include <ATen/ATen.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "command.h"
#include "ferry/base/error.h"
#include "ferry/base/progress.h"
#include "ferry/base/units.h"
#include "ferry/io/atomic_file.h"
#include "ferry/io/json_file.h"
#include "ferry/io/safetensors.h"
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

void write_random(io::SafetensorsWriter& writer, const weights::Slot& slot, at::ScalarType dtype,
                  tensor::Generator& generator, const StopToken& stop,
                  const std::function<void(uint64_t)>& wrote) {
  auto [deviation, mean] = deviation_and_mean(slot);
  constexpr int64_t kChunk = 1 << 20;
  for (int64_t left = slot.tensor.numel(); left > 0; left -= kChunk) {
    stop.throw_if_stopped();
    at::Tensor values = tensor::randn_tensor({std::min(left, kChunk)}, {generator});
    values = values.mul_(deviation).add_(mean).to(dtype);
    writer.write({static_cast<const std::byte*>(values.const_data_ptr()), values.nbytes()});
    wrote(values.nbytes());
  }
}

// The slots of each file: in order, a new file where the next slot would pass the limit.
std::vector<std::vector<const weights::Slot*>> cut_into_shards(
    const std::vector<weights::Slot>& slots, at::ScalarType dtype, uint64_t limit) {
  std::vector<std::vector<const weights::Slot*>> shards(1);
  uint64_t filled = 0;
  for (const weights::Slot& slot : slots) {
    uint64_t bytes = slot.tensor.numel() * c10::elementSize(dtype);
    if (filled > 0 && filled + bytes > limit) {
      shards.emplace_back();
      filled = 0;
    }
    shards.back().push_back(&slot);
    filled += bytes;
  }
  return shards;
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
    config = Json::parse(io::read_text_file(options.config), nullptr, /*allow_exceptions=*/false);
    if (!config.is_object()) throw_error<FormatError>("{}: expected a JSON object", options.config);
  }
  shard_bytes = options.shard_bytes.value_or(shard_bytes > 0 ? shard_bytes : 10'000'000'000);
  at::ScalarType dtype = tensor::parse_dtype(options.dtype);

  auto model = models::make_model(class_name, config, options.config);
  std::vector<weights::Slot> slots = weights::collect_slots(*model);
  std::erase_if(slots, [](const weights::Slot& slot) { return !at::isFloatingType(slot.dtype()); });
  uint64_t total = 0;
  for (const weights::Slot& slot : slots) total += slot.tensor.numel() * c10::elementSize(dtype);

  std::filesystem::path out = options.out;
  std::error_code error;
  std::filesystem::create_directories(out, error);
  if (error) throw_error<IoError>("{}: cannot create the folder: {}", options.out, error.message());

  bool diffusers = model->library() == "diffusers";
  std::string base = diffusers ? "diffusion_pytorch_model" : "model";
  auto shards = cut_into_shards(slots, dtype, shard_bytes);
  Json index = {{"metadata", {{"total_size", total}}}, {"weight_map", Json::object()}};
  auto generator = tensor::Generator().manual_seed(options.seed);
  ProgressBar progress("writing MB", total / 1'000'000,
                       {.mode = context.quiet ? ProgressMode::quiet : ProgressMode::automatic});
  uint64_t written_bytes = 0;
  for (size_t i = 0; i < shards.size(); ++i) {
    std::string file = shards.size() == 1 ? base + ".safetensors"
                                          : fmt::format("{}-{:05}-of-{:05}.safetensors", base,
                                                        i + 1, shards.size());
    std::vector<io::SafetensorsWriter::Entry> entries;
    for (const weights::Slot* slot : shards[i]) {
      entries.push_back({slot->name(), tensor::from_torch(dtype), slot->shape().vec()});
      index["weight_map"][slot->name()] = file;
    }
    io::SafetensorsWriter writer(out / file, entries);
    for (const weights::Slot* slot : shards[i]) {
      write_random(writer, *slot, dtype, generator, context.stop, [&](uint64_t bytes) {
        written_bytes += bytes;
        progress.set(written_bytes / 1'000'000);
      });
    }
    writer.finish();
  }
  progress.finish();
  if (shards.size() > 1) write_json((out / (base + ".safetensors.index.json")).string(), index);

  Json config_written = model->config_json();
  if (diffusers) {
    if (!config_written.contains("_class_name")) config_written["_class_name"] = class_name;
    if (!config_written.contains("_diffusers_version"))
      config_written["_diffusers_version"] = "0.42.1";
  } else {
    if (!config_written.contains("architectures")) config_written["architectures"] = {class_name};
    config_written["dtype"] = tensor::dtype_name(dtype);
  }
  // Last: a folder with config.json is complete.
  write_json((out / "config.json").string(), config_written);
  if (!context.quiet) {
    fmt::print("{}: {} {} in {} file{}\n", options.out, class_name, format_bytes(total),
               shards.size(), shards.size() == 1 ? "" : "s");
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
