// ferry pack: lossless packs of a component's weights, or of all of a pipeline's.
#include <chrono>
#include <cstring>
#include <filesystem>

#include "command.h"
#include "ferry/base/error.h"
#include "ferry/base/progress.h"
#include "ferry/base/system_info.h"
#include "ferry/base/units.h"
#include "ferry/io/json_file.h"
#include "packing_bar.h"

namespace ferry::cli {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

struct PackCommandOptions {
  std::string folder, out, variant, stats;
  std::optional<int> threads;
  bool verify = false;
};

struct ComponentFolder {
  std::string name;  // empty for a component given by itself
  fs::path folder;
  std::string class_name;  // empty: config.json names it
};

// The components with weights that ferry knows; nothing is loaded.
std::vector<ComponentFolder> components_of(const fs::path& folder) {
  const fs::path index_path = folder / "model_index.json";
  if (!fs::exists(index_path)) {
    if (fs::exists(folder / "config.json")) return {{"", folder, ""}};
    throw_error<IoError>(
        "{}: has neither model_index.json (a pipeline) nor config.json (a component)",
        folder.string());
  }
  std::vector<ComponentFolder> components;
  const nlohmann::json index = io::read_json_object(index_path);
  for (const auto& [name, value] : index.items()) {
    if (name.starts_with("_") || !value.is_array() || value.size() != 2 || !value[1].is_string())
      continue;
    if (name.find('/') != std::string::npos || name == "." || name == "..")
      throw_error<FormatError>("{}: component name \"{}\" is no folder name", index_path.string(),
                               name);
    const std::string class_name = value[1];
    for (const models::ModelClass& known : models::model_classes()) {
      if (known.name == class_name) components.push_back({name, folder / name, class_name});
    }
  }
  if (components.empty())
    throw_error<FormatError>("{}: names no component that ferry knows and could pack",
                             index_path.string());
  return components;
}

// Every tensor of `pack` equals the checkpoint's, bit for bit.
void compare(const weights::Checkpoint& pack, const weights::Checkpoint& source,
             const Context& context) {
  ProgressBar bar("comparing", source.tensors().size(), {.mode = progress_mode(context)});
  for (const weights::StoredTensor& expected : source.tensors()) {
    context.stop.throw_if_stopped();
    const weights::StoredTensor* stored = pack.find(expected.key);
    at::Tensor packed = stored ? weights::read_stored(*stored) : at::Tensor();
    at::Tensor plain = weights::read_stored(expected);
    if (!stored || stored->dtype != expected.dtype || packed.nbytes() != plain.nbytes() ||
        std::memcmp(packed.const_data_ptr(), plain.const_data_ptr(), plain.nbytes()) != 0) {
      throw_error<FormatError>("{}: tensor \"{}\" differs from the checkpoint's",
                               pack.files().front()->path().string(), expected.key);
    }
    bar.advance();
  }
  bar.finish();
}

nlohmann::ordered_json pack_component(const ComponentFolder& component,
                                      const PackCommandOptions& options, const Context& context) {
  auto model =
      models::load_model(component.folder, {.variant = options.variant}, component.class_name);
  const weights::Checkpoint& source = *model->binding()->checkpoint;
  const std::string label = component.name.empty() ? model->class_name() : component.name;
  PackingBar packing(label, *model, context);

  const auto begin = Clock::now();
  std::shared_ptr<const weights::Checkpoint> pack;
  bool was_there = false;
  if (options.out.empty()) {
    weights::PackCache cache;
    pack = weights::find_cached_pack(cache, source);
    was_there = pack != nullptr;
    if (!pack) pack = weights::make_cached_pack(cache, source, packing.options());
  } else {
    fs::path file = options.out;
    if (!component.name.empty()) {
      fs::create_directories(file);
      file /= component.name + ".pack";
    }
    weights::write_lossless_pack(source, file, packing.options());
    pack = weights::open_pack(file, &source);
  }
  const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  if (was_there) packing.bar().set_note("in the cache already");
  packing.bar().finish();
  if (options.verify) compare(*pack, source, context);

  const io::File& file = *pack->files().front();
  const double ratio = static_cast<double>(file.size_bytes()) /
                       static_cast<double>(std::max<uint64_t>(source.total_bytes(), 1));
  if (!context.quiet) {
    fmt::print("{}: {} -> {} ({:.3f}), {}, {}{}\n", label, format_bytes(source.total_bytes()),
               format_bytes(file.size_bytes()), ratio,
               was_there ? "in the cache already" : format_duration(seconds), file.path().string(),
               options.verify ? ", bit-identical" : "");
  }
  return {{"component", label},
          {"file", file.path().string()},
          {"weight_bytes", source.total_bytes()},
          {"pack_bytes", file.size_bytes()},
          {"ratio", ratio},
          {"seconds", was_there ? 0 : seconds},
          {"peak_rss_bytes", peak_rss_bytes()}};
}

int run_pack(const PackCommandOptions& options, Context& context) {
  check_writable_parent(options.stats);
  set_threads(options.threads);
  const std::vector<ComponentFolder> components = components_of(options.folder);
  if (components.front().name.empty()) check_writable_parent(options.out);
  nlohmann::ordered_json stats = nlohmann::ordered_json::array();
  for (const ComponentFolder& component : components)
    stats.push_back(pack_component(component, options, context));
  if (!options.stats.empty()) write_json(options.stats, stats);
  return 0;
}

}  // namespace

Command add_pack(CLI::App& app) {
  auto options = std::make_shared<PackCommandOptions>();
  CLI::App* command =
      app.add_subcommand("pack", "Write lossless packs: the same weights in fewer bytes");
  command->footer(
      "Packs the weights of a component folder, or of each component of a pipeline folder, so "
      "that\n"
      "streaming them reads about a third less (bf16). The tensors stay the same bit for bit.\n"
      "Without --out, packs go to the pack cache, where generate and forward find them with\n"
      "--use-packs; ferry cache shows and removes them.");
  command->add_option("folder", options->folder, "component or pipeline folder")
      ->required()
      ->type_name("DIR");
  command
      ->add_option("--out", options->out,
                   "file to write; for a pipeline, a folder [default: the pack cache]")
      ->type_name("FILE");
  command->add_option("--variant", options->variant, "weights variant, e.g. fp16")
      ->type_name("NAME");
  command->add_flag("--verify", options->verify, "compare every tensor with the checkpoint's");
  command->add_option("--threads", options->threads, "compressing threads")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  command->add_option("--stats", options->stats, "write sizes, times and peak memory as JSON")
      ->type_name("FILE");
  return {command, [options](Context& context) { return run_pack(*options, context); }};
}

}  // namespace ferry::cli
