// ferry quantize: a component, or a pipeline's components, with quantized weights.
#include <chrono>
#include <filesystem>

#include "command.h"
#include "ferry/base/error.h"
#include "ferry/base/system_info.h"
#include "ferry/base/units.h"
#include "ferry/models/quantizing.h"
#include "quantizing_bar.h"

namespace ferry::cli {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

struct QuantizeCommandOptions {
  std::string folder, out, variant, stats;
  models::QuantizeOptions quantize;
  std::optional<uint64_t> shard_bytes;
  std::optional<int> threads;
};

int run_quantize(const QuantizeCommandOptions& options, Context& context) {
  check_writable_parent(options.stats);
  set_threads(options.threads);
  if (fs::exists(options.out) && fs::equivalent(options.folder, options.out)) {
    throw_error<ArgumentError>("--out {}: is the folder that is read; name another", options.out);
  }
  auto model = models::load_model(options.folder, {.variant = options.variant});
  QuantizingBar bar("quantizing, layers", context);
  models::QuantizeOptions quantize = options.quantize;
  bar.attach(quantize);
  models::Quantizing quantizing(*model, quantize);
  const auto begin = Clock::now();
  quantizing.target().save_pretrained_from(
      [&](const weights::Slot& slot, io::SafetensorsWriter& writer) {
        quantizing.write(slot, writer);
      },
      options.out, options.shard_bytes.value_or(models::Model::kMaxShardSizeBytes));
  bar.finish();
  const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();

  nlohmann::ordered_json layers = nlohmann::ordered_json::array();
  double worst = std::numeric_limits<double>::infinity();
  std::string worst_layer;
  for (const models::QuantizedLayer& layer : quantizing.layers()) {
    layers.push_back({{"name", layer.name},
                      {"bytes_before", layer.bytes_before},
                      {"bytes_after", layer.bytes_after},
                      {"sqnr_db", layer.sqnr_db}});
    if (layer.sqnr_db < worst) {
      worst = layer.sqnr_db;
      worst_layer = layer.name;
    }
  }
  nlohmann::ordered_json kept = nlohmann::ordered_json::array();
  for (const auto& [layer, reason] : quantizing.kept())
    kept.push_back({{"name", layer}, {"reason", reason}});
  const uint64_t before = weights::total_bytes(weights::collect_slots(*model));
  const uint64_t after = weights::total_bytes(weights::collect_slots(quantizing.target()));
  if (!options.stats.empty()) {
    write_json(options.stats, {{"scheme", options.quantize.scheme},
                               {"bytes_before", before},
                               {"bytes_after", after},
                               {"seconds", seconds},
                               {"peak_rss_bytes", peak_rss_bytes()},
                               {"layers", layers},
                               {"kept", kept}});
  }
  if (!context.quiet) {
    fmt::print("{}: {} -> {} ({:.3f}), {} layers, {} kept, least SQNR {:.1f} dB ({}), {}, {}\n",
               options.out, format_bytes(before), format_bytes(after),
               static_cast<double>(after) / static_cast<double>(before), quantizing.layers().size(),
               quantizing.kept().size(), worst, worst_layer, format_duration(seconds),
               format_rate(static_cast<double>(before) / seconds));
  }
  return 0;
}

std::string scheme_list() {
  std::string text;
  for (const quant::Scheme& scheme : quant::schemes())
    text += fmt::format("\n  {:<10} {}", scheme.name, scheme.description);
  return text;
}

}  // namespace

Command add_quantize(CLI::App& app) {
  auto options = std::make_shared<QuantizeCommandOptions>();
  CLI::App* command = app.add_subcommand("quantize", "Write a component with quantized weights");
  command->footer(
      "Reads a component folder layer by layer, so that memory holds one layer, and writes a\n"
      "folder that ferry and Python diffusers load. Schemes:" +
      scheme_list());
  command->add_option("folder", options->folder, "component folder")->required()->type_name("DIR");
  command->add_option("--scheme", options->quantize.scheme, "how: see below")
      ->required()
      ->type_name("NAME");
  command->add_option("--out", options->out, "folder to write")->required()->type_name("DIR");
  command
      ->add_option("--group-size", options->quantize.group_size,
                   "columns that share a scale, where the scheme has groups")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  command
      ->add_option("--skip", options->quantize.skip,
                   "layers that stay as they are, by dotted name or part of one; repeat for more")
      ->type_name("PATTERN");
  command->add_option("--variant", options->variant, "weights variant, e.g. fp16")
      ->type_name("NAME");
  add_bytes(command, "--max-shard-size", options->shard_bytes, "start a new file above this size");
  command->add_option("--threads", options->threads, "compute threads")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  command->add_option("--stats", options->stats, "write each layer's sizes and SQNR as JSON")
      ->type_name("FILE");
  return {command, [options](Context& context) { return run_quantize(*options, context); }};
}

}  // namespace ferry::cli
