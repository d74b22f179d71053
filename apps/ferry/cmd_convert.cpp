// ferry convert: a single file (GGUF, Black Forest Labs' or latent diffusion's names) to a
// diffusers folder, and back.
#include <chrono>
#include <filesystem>

#include "command.h"
#include "ferry/base/error.h"
#include "ferry/base/progress.h"
#include "ferry/base/units.h"
#include "ferry/models/config.h"
#include "ferry/models/single_file.h"
#include "ferry/models/single_file_writer.h"
#include "ferry/tensor/dtype.h"
#include "ferry/weights/slot.h"

namespace ferry::cli {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

struct ConvertCommandOptions {
  std::string source, out, class_name, config, dtype, gguf_type, variant;
  std::optional<uint64_t> shard_bytes;
  std::optional<int> threads;
};

std::optional<at::ScalarType> wanted_dtype(const std::string& name) {
  if (name.empty()) return std::nullopt;
  return tensor::parse_dtype(name);
}

void to_folder(const ConvertCommandOptions& options, Context& context) {
  if (!options.gguf_type.empty()) {
    throw_error<ArgumentError>("--gguf-type: is for a folder that becomes a file, but {} is a file",
                               options.source);
  }
  models::LoadOptions load{.dtype = wanted_dtype(options.dtype)};
  nlohmann::ordered_json config;
  if (!options.config.empty()) config = models::read_config(options.config);
  models::SingleFile single = models::open_single_file(options.source, options.class_name);
  models::dequantize_when_read(single, tensor::from_torch(load.dtype.value_or(at::kBFloat16)));
  auto model = models::bind_single_file(std::move(single), load, config);

  std::map<std::string, const weights::BoundSlot*> bound;
  for (const weights::BoundSlot& slot : model->binding()->slots) bound[slot.slot.name()] = &slot;
  ProgressBar bar("converting, tensors", bound.size(), {.mode = progress_mode(context)});
  model->save_pretrained_from(
      [&](const weights::Slot& slot, io::SafetensorsWriter& writer) {
        context.stop.throw_if_stopped();
        at::Tensor tensor = weights::read_tensor(*bound.at(slot.name())).contiguous();
        writer.write({static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()});
        bar.advance();
      },
      options.out, options.shard_bytes.value_or(models::Model::kMaxShardSizeBytes));
  bar.finish();
}

void to_file(const ConvertCommandOptions& options, Context& context) {
  const bool is_gguf = fs::path(options.out).extension() == ".gguf";
  if (is_gguf == options.gguf_type.empty()) {
    throw_error<ArgumentError>("{}: {}", options.out,
                               is_gguf ? "a GGUF file needs --gguf-type"
                                       : "with --gguf-type the file's name has to end in .gguf");
  }
  models::WriteSingleFileOptions write{.stop = context.stop};
  if (is_gguf) {
    write.gguf_type = io::parse_ggml_type(options.gguf_type);
    if (!write.gguf_type)
      throw_error<ArgumentError>("--gguf-type {}: no type of GGUF", options.gguf_type);
  }
  auto model = models::load_model(
      options.source, {.dtype = wanted_dtype(options.dtype), .variant = options.variant},
      options.class_name);
  std::optional<ProgressBar> bar;
  write.on_tensor = [&](size_t, size_t count) {
    if (!bar)
      bar.emplace("converting, tensors", count, ProgressOptions{.mode = progress_mode(context)});
    bar->advance();
  };
  models::write_single_file(*model, options.out, write);
  if (bar) bar->finish();
}

int run_convert(const ConvertCommandOptions& options, Context& context) {
  set_threads(options.threads);
  const auto begin = Clock::now();
  if (fs::is_directory(options.source)) {
    to_file(options, context);
  } else {
    to_folder(options, context);
  }
  const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  if (!context.quiet)
    fmt::print("{} -> {}, {}\n", options.source, options.out, format_duration(seconds));
  return 0;
}

}  // namespace

Command add_convert(CLI::App& app) {
  auto options = std::make_shared<ConvertCommandOptions>();
  CLI::App* command =
      app.add_subcommand("convert", "Convert a single file to a component folder, or back");
  command->footer(
      "A file (.gguf, .safetensors) becomes a folder that ferry and Python diffusers load, its\n"
      "blocks dequantized. A folder becomes a file under the names that ComfyUI,\n"
      "stable-diffusion.cpp and llama.cpp know: .safetensors, or .gguf with --gguf-type.\n"
      "Memory holds one tensor at a time.");
  command->add_option("source", options->source, "single file or component folder")
      ->required()
      ->type_name("PATH");
  command->add_option("--out", options->out, "folder or file to write")
      ->required()
      ->type_name("PATH");
  command
      ->add_option("--gguf-type", options->gguf_type,
                   "blocks of a GGUF file: Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, or BF16, F16, F32")
      ->type_name("TYPE");
  command->add_option("--class", options->class_name, "model class, where a file holds several")
      ->type_name("NAME");
  command
      ->add_option("--config", options->config,
                   "config.json whose entries replace what is found by shapes")
      ->check(CLI::ExistingFile)
      ->type_name("FILE");
  command
      ->add_option("--dtype", options->dtype,
                   "fp32, bf16 or fp16; GGUF to a folder: bf16, else as stored")
      ->type_name("NAME");
  command->add_option("--variant", options->variant, "weights variant of a folder, e.g. fp16")
      ->type_name("NAME");
  add_bytes(command, "--max-shard-size", options->shard_bytes, "start a new file above this size");
  command->add_option("--threads", options->threads, "compute threads")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  return {command, [options](Context& context) { return run_convert(*options, context); }};
}

}  // namespace ferry::cli
