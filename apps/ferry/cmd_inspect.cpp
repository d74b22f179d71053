// ferry inspect: what is in a folder or file, and what streaming it would take.
#include <algorithm>
#include <filesystem>
#include <map>

#include "command.h"
#include "ferry/base/error.h"
#include "ferry/base/units.h"
#include "ferry/hooks/group_offloading.h"
#include "ferry/models/config.h"
#include "ferry/models/model.h"
#include "ferry/nn/linear.h"
#include "ferry/offload/engine.h"
#include "ferry/pipelines/hub.h"
#include "ferry/weights/checkpoint.h"

namespace ferry::cli {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

struct InspectOptions {
  std::string path, traits, variant;
  bool json = false, tensors = false;
};

Json describe_checkpoint(const weights::Checkpoint& checkpoint, bool list_tensors) {
  uint64_t parameters = 0;
  std::map<std::string, uint64_t> bytes_by_dtype;
  Json tensors = Json::array();
  for (const weights::StoredTensor& tensor : checkpoint.tensors()) {
    parameters += tensor.size_bytes / io::item_size(tensor.dtype);
    bytes_by_dtype[std::string(io::name(tensor.dtype))] += tensor.size_bytes;
    if (list_tensors) {
      tensors.push_back({{"name", tensor.key},
                         {"dtype", io::name(tensor.dtype)},
                         {"shape", tensor.shape},
                         {"bytes", tensor.size_bytes},
                         {"file", tensor.file->path().filename().string()},
                         {"offset", tensor.offset}});
    }
  }
  Json files = Json::array();
  for (const auto& file : checkpoint.files()) {
    files.push_back({{"name", file->path().filename().string()}, {"bytes", file->size_bytes()}});
  }
  Json description = {{"tensors", checkpoint.tensors().size()},
                      {"parameters", parameters},
                      {"bytes", checkpoint.total_bytes()},
                      {"bytes_by_dtype", bytes_by_dtype},
                      {"files", files}};
  // TorchAO's metadata has an entry a tensor, which describe_quantization() sums up.
  Json metadata = Json::object();
  for (const auto& [key, value] : checkpoint.metadata()) {
    if (key.find('.') == std::string::npos && key != "tensor_names") metadata[key] = value;
  }
  if (!metadata.empty()) description["metadata"] = metadata;
  if (list_tensors) description["tensor_list"] = tensors;
  return description;
}

// The least weights budget under which the engine takes the model, to 1 KiB: the engine itself is
// asked, since only it knows what a group takes besides its weights.
uint64_t smallest_budget(models::Model& model, uint64_t enough) {
  auto works = [&](uint64_t budget) {
    offload::EngineOptions options;
    options.weights_memory_bytes = budget;
    try {
      hooks::apply_group_offloading(model, model.binding(),
                                    std::make_shared<offload::Engine>(options));
      return true;
    } catch (const BudgetError&) {
      return false;
    }
  };
  uint64_t low = 0, high = enough;
  while (high - low > 1024) {
    uint64_t middle = low + (high - low) / 2;
    (works(middle) ? high : low) = middle;
  }
  return high;
}

// What leaf-level offloading would move: the leaves, and the small slots that stay.
Json describe_streaming(models::Model& model) {
  const uint64_t small_slot = offload::EngineOptions().small_slot_bytes;
  std::map<std::string, uint64_t> leaves;
  uint64_t small = 0, total = 0;
  for (const weights::Slot& slot : weights::collect_slots(model)) {
    total += slot.size_bytes();
    if (slot.size_bytes() < small_slot) {
      small += slot.size_bytes();
      continue;
    }
    size_t dot = slot.name().rfind('.');
    leaves[dot == std::string::npos ? "" : slot.name().substr(0, dot)] += slot.size_bytes();
  }
  std::pair<std::string, uint64_t> largest;
  for (const auto& [name, bytes] : leaves) {
    if (bytes > largest.second) largest = {name, bytes};
  }
  return {{"leaves", leaves.size()},
          {"largest_leaf", largest.first},
          {"largest_leaf_bytes", largest.second},
          {"small_bytes", small},
          // with room for what direct reads take beyond both ends of a leaf
          {"smallest_budget_bytes", smallest_budget(model, total + (1 << 20))},
          {"comfortable_budget_bytes",
           std::min<uint64_t>(total, small + 2 * largest.second + (64 << 20))}};
}

// Per scheme: how many layers, and their weights' bytes. Null where none is quantized.
Json describe_quantization(const models::Model& model) {
  std::map<std::string, std::pair<uint64_t, uint64_t>> schemes;
  for (const auto& module : model.modules()) {
    const auto* linear = dynamic_cast<const nn::Linear*>(module.get());
    if (!linear || !linear->quantized_weight()) continue;
    auto& [layers, bytes] = schemes[std::string(linear->quantized_weight()->scheme())];
    ++layers;
    bytes += linear->quantized_weight()->size_bytes();
  }
  Json description;
  for (const auto& [scheme, entry] : schemes)
    description[scheme] = {{"layers", entry.first}, {"bytes", entry.second}};
  return description;
}

Json describe_component(const fs::path& folder, const InspectOptions& options,
                        const std::string& class_hint) {
  Json config = models::read_config(folder / "config.json");
  std::string class_name = class_hint;
  if (class_name.empty() && config.contains("_class_name")) class_name = config["_class_name"];
  if (class_name.empty() && config.contains("architectures") && !config["architectures"].empty()) {
    class_name = config["architectures"][0];
  }
  Json description = {{"class", class_name}};
  std::string base;
  for (const char* candidate : {"diffusion_pytorch_model", "model"}) {
    std::string with_variant = candidate + (options.variant.empty() ? "" : "." + options.variant);
    for (const std::string& name : {std::string(candidate), with_variant}) {
      if (fs::exists(folder / (name + ".safetensors")) ||
          fs::exists(folder / (name + ".safetensors.index.json")) ||
          fs::exists(folder /
                     fmt::format("{}.safetensors.index.{}.json", candidate, options.variant))) {
        base = candidate;
      }
    }
  }
  if (base.empty()) {
    description["problem"] = "no safetensors weights in this folder";
    return description;
  }
  auto checkpoint = weights::Checkpoint::open_folder(folder, base, options.variant);
  description.update(describe_checkpoint(*checkpoint, options.tensors));
  bool known = std::any_of(models::model_classes().begin(), models::model_classes().end(),
                           [&](const auto& entry) { return entry.name == class_name; });
  description["supported"] = known;
  if (known) {
    try {
      auto model = models::load_model(folder, {.variant = options.variant}, class_name);
      if (Json quantized = describe_quantization(*model); !quantized.is_null())
        description["quantized"] = quantized;
      description["streaming"] = describe_streaming(*model);
    } catch (const Error& error) {
      description["problem"] = error.what();
    }
  }
  return description;
}

Json describe_pipeline(const fs::path& folder, const InspectOptions& options) {
  Json index = models::read_config(folder / "model_index.json");
  Json description = {
      {"kind", "pipeline"}, {"class", index.value("_class_name", "")}, {"path", folder.string()}};
  Json components = Json::object();
  for (const auto& [name, value] : index.items()) {
    if (name.starts_with("_")) continue;
    if (!value.is_array() || value.size() != 2) {
      description["settings"][name] = value;
      continue;
    }
    if (value[0].is_null() || value[1].is_null()) {
      components[name] = {{"class", nullptr}};
      continue;
    }
    Json component = {{"class", value[1]}, {"library", value[0]}};
    try {
      if (fs::exists(folder / name / "config.json")) {
        component.update(describe_component(folder / name, options, value[1]));
      } else if (!fs::is_directory(folder / name)) {
        component["problem"] = "the folder is missing";
      }
    } catch (const Error& error) {
      component["problem"] = error.what();
    }
    components[name] = component;
  }
  description["components"] = components;
  uint64_t bytes = 0, parameters = 0, small = 0, largest = 0;
  for (const auto& component : components) {
    bytes += component.value("bytes", uint64_t{0});
    parameters += component.value("parameters", uint64_t{0});
    if (component.contains("streaming")) {
      const Json& streaming = component["streaming"];
      uint64_t own = streaming["small_bytes"];
      small += own;  // of all components at once
      largest = std::max(largest, streaming["smallest_budget_bytes"].get<uint64_t>() - own);
    }
  }
  description["parameters"] = parameters;
  description["bytes"] = bytes;
  description["smallest_budget_bytes"] = small + largest;
  return description;
}

std::string count_text(uint64_t count) {
  if (count >= 1'000'000'000) return fmt::format("{:.2f} B", static_cast<double>(count) / 1e9);
  if (count >= 1'000'000) return fmt::format("{:.1f} M", static_cast<double>(count) / 1e6);
  return fmt::format("{:.1f} k", static_cast<double>(count) / 1e3);
}

void print_weights(const Json& d, const char* indent) {
  if (d.contains("parameters") && d.contains("files")) {
    std::string dtypes;
    for (const auto& [dtype, bytes] : d["bytes_by_dtype"].items()) {
      dtypes += fmt::format("{}{} {}", dtypes.empty() ? "" : ", ", dtype,
                            format_bytes(bytes.get<uint64_t>()));
    }
    fmt::print("{}{} parameters in {} tensors; {}; {} file{}\n", indent,
               count_text(d["parameters"]), d["tensors"].get<size_t>(), dtypes, d["files"].size(),
               d["files"].size() == 1 ? "" : "s");
  }
  if (d.contains("quantized")) {
    for (const auto& [scheme, entry] : d["quantized"].items()) {
      fmt::print("{}quantized: {} layers as {}, {}\n", indent, entry["layers"].get<size_t>(),
                 scheme, format_bytes(entry["bytes"].get<uint64_t>()));
    }
  }
  if (d.contains("streaming")) {
    const Json& s = d["streaming"];
    fmt::print("{}streaming: at least {}; largest leaf {} ({}); comfortable from {}\n", indent,
               format_bytes_up(s["smallest_budget_bytes"]), format_bytes(s["largest_leaf_bytes"]),
               s["largest_leaf"].get<std::string>(), format_bytes(s["comfortable_budget_bytes"]));
  }
  if (d.contains("supported") && !d["supported"].get<bool>())
    fmt::print("{}ferry does not have this class\n", indent);
  if (d.contains("problem")) fmt::print("{}problem: {}\n", indent, d["problem"].get<std::string>());
  if (d.contains("tensor_list")) {
    for (const Json& t : d["tensor_list"]) {
      fmt::print("{}  {} {} {}\n", indent, t["name"].get<std::string>(),
                 t["dtype"].get<std::string>(), t["shape"].dump());
    }
  }
}

void print_description(const Json& d) {
  if (d["kind"] == "pipeline") {
    fmt::print("{}: {}, {} parameters, {}\n", d["path"].get<std::string>(),
               d["class"].get<std::string>(), count_text(d["parameters"]),
               format_bytes(d["bytes"]));
    for (const auto& [name, component] : d["components"].items()) {
      if (component["class"].is_null()) {
        fmt::print("  {}: none\n", name);
        continue;
      }
      fmt::print("  {}: {}\n", name, component["class"].get<std::string>());
      print_weights(component, "      ");
    }
    if (d.contains("settings")) fmt::print("  settings: {}\n", d["settings"].dump());
    if (d["smallest_budget_bytes"] > 0) {
      fmt::print("ferry generate --weights-memory needs at least {}\n",
                 format_bytes_up(d["smallest_budget_bytes"]));
    }
  } else {
    fmt::print("{}: {}\n", d["path"].get<std::string>(), d.value("class", "safetensors file"));
    print_weights(d, "  ");
  }
}

// What the model class declares, under Python's names.
Json traits_of(const std::string& class_name) {
  auto model = models::make_model(class_name, Json::object());
  models::Traits traits = model->traits();
  return {{"_keep_in_fp32_modules", traits.keep_in_fp32_modules},
          {"_no_split_modules", traits.no_split_modules},
          {"_skip_layerwise_casting_patterns", traits.skip_layerwise_casting_patterns},
          {"_repeated_blocks", traits.repeated_blocks},
          {"_tied_weights_keys", traits.tied_keys},
          {"_supports_gradient_checkpointing", traits.supports_gradient_checkpointing}};
}

int run_inspect(const InspectOptions& options, Context&) {
  if (!options.traits.empty()) {
    fmt::print("{}\n", traits_of(options.traits).dump(2));
    return 0;
  }
  if (options.path.empty())
    throw_error<ArgumentError>("inspect: give a folder, a file or --traits CLASS");
  Json description;
  if (fs::is_regular_file(options.path)) {
    description = {{"kind", "file"}, {"path", options.path}};
    description.update(
        describe_checkpoint(*weights::Checkpoint::open_file(options.path), options.tensors));
  } else {
    fs::path folder = pipelines::resolve_folder(options.path);
    if (fs::exists(folder / "model_index.json")) {
      description = describe_pipeline(folder, options);
    } else if (fs::exists(folder / "config.json")) {
      description = {{"kind", "component"}, {"path", folder.string()}};
      description.update(describe_component(folder, options, ""));
    } else {
      throw_error<IoError>(
          "{}: neither a pipeline (model_index.json) nor a component (config.json)",
          folder.string());
    }
  }
  if (options.json) {
    fmt::print("{}\n", description.dump(2));
  } else {
    print_description(description);
  }
  return 0;
}

}  // namespace

Command add_inspect(CLI::App& app) {
  auto options = std::make_shared<InspectOptions>();
  CLI::App* command = app.add_subcommand("inspect", "Show what is in a model folder or file");
  command->footer(
      "Shows components, classes, parameters, bytes by dtype, files, and what streaming would "
      "take.\n"
      "Reads headers only.");
  command
      ->add_option("path", options->path,
                   "pipeline or component folder, safetensors file, or org/repo[@revision]")
      ->type_name("DIR|FILE");
  command->add_flag("--json", options->json, "print JSON");
  command->add_flag("--tensors", options->tensors, "also list every tensor");
  command->add_option("--variant", options->variant, "weights variant, e.g. fp16")
      ->type_name("NAME");
  command->add_option("--traits", options->traits, "print what a model class declares, as JSON")
      ->type_name("CLASS");
  return {command, [options](Context& context) { return run_inspect(*options, context); }};
}

}  // namespace ferry::cli
