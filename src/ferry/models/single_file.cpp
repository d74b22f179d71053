#include "ferry/models/single_file.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <unordered_set>

#include "ferry/base/error.h"
#include "ferry/models/bind_options.h"
#include "ferry/models/key_maps.h"
#include "ferry/models/stored_binding.h"
#include "ferry/quant/gguf.h"

namespace ferry::models {

namespace {

constexpr std::string_view kProjection = "CLIPTextModelWithProjection";

std::unordered_set<std::string> names_of(const quant::StoredWeights& weights) {
  std::unordered_set<std::string> names;
  for (const weights::StoredTensor& tensor : weights.plain) names.insert(tensor.key);
  for (const auto& [name, quantized] : weights.quantized) names.insert(name);
  return names;
}

// The tensors behind a prefix, without it; all of them where it is empty.
quant::StoredWeights without_prefix(const quant::StoredWeights& weights, std::string_view prefix) {
  if (prefix.empty()) return weights;
  quant::StoredWeights inner;
  for (const weights::StoredTensor& tensor : weights.plain) {
    if (!tensor.key.starts_with(prefix)) continue;
    inner.plain.push_back(tensor);
    inner.plain.back().key.erase(0, prefix.size());
  }
  for (const auto& [name, quantized] : weights.quantized) {
    if (name.starts_with(prefix)) inner.quantized.emplace(name.substr(prefix.size()), quantized);
  }
  return inner;
}

struct Match {
  const KeyMap* map;
  std::string_view prefix;
};

bool is_of_class(const KeyMap& map, const std::string& class_name) {
  if (class_name.empty() || class_name == map.class_name) return true;
  return class_name == kProjection && map.class_name == "CLIPTextModel";
}

Match find_key_map(const quant::StoredWeights& weights, const std::string& class_name,
                   const std::string& where) {
  const std::unordered_set<std::string> names = names_of(weights);
  std::vector<std::string_view> others;
  for (const KeyMap& map : key_maps()) {
    for (std::string_view prefix : map.prefixes) {
      bool found =
          std::all_of(map.markers.begin(), map.markers.end(), [&](std::string_view marker) {
            return names.contains(std::string(prefix) + std::string(marker));
          });
      if (!found) continue;
      if (is_of_class(map, class_name)) return {&map, prefix};
      others.push_back(map.name);
    }
  }
  if (!others.empty()) {
    throw_error<FormatError>("{}: holds no {}, but {}", where, class_name, fmt::join(others, ", "));
  }
  std::vector<std::string_view> known;
  for (const KeyMap& map : key_maps()) known.push_back(map.name);
  std::vector<std::string> some(names.begin(), names.end());
  std::sort(some.begin(), some.end());
  some.resize(std::min<size_t>(some.size(), 3));
  throw_error<FormatError>(
      "{}: its {} tensors ('{}', …) are no model that ferry knows; it knows single files of: {}",
      where, names.size(), fmt::join(some, "', '"), fmt::join(known, "; "));
}

void read_file(SingleFile& single, const std::filesystem::path& path) {
  if (io::is_gguf(*io::File::open(path))) {
    quant::GgufCheckpoint checkpoint = quant::open_gguf(path);
    single.is_gguf = true;
    single.file = std::move(checkpoint.file);
    single.gguf = std::move(checkpoint.metadata);
    single.weights = std::move(checkpoint.weights);
    return;
  }
  auto checkpoint = weights::Checkpoint::open_file(path);
  single.file = checkpoint->files().front();
  single.metadata = checkpoint->metadata();
  single.weights = quant::read_weights(*checkpoint);
}

// The dtype of slots where the caller does not say.
void choose_dtypes(weights::BindOptions& options, const SingleFile& single) {
  if (options.dtype || single.is_gguf) return;
  options.dtype = [](const std::string&, at::ScalarType stored) {
    return at::isFloat8Type(stored) ? at::kBFloat16 : stored;
  };
}

}  // namespace

SingleFile open_single_file(const std::filesystem::path& path, const std::string& class_name) {
  const std::string where = path.string();
  SingleFile single;
  read_file(single, path);
  const Match match = find_key_map(single.weights, class_name, where);
  single.key_map = match.map->name;
  single.weights = match.map->map(without_prefix(single.weights, match.prefix));
  single.class_name = class_name.empty() ? std::string(match.map->class_name) : class_name;
  single.config = config_by_shapes(single.class_name, single.weights, single.gguf, where);
  // CLIP L is used without its projection, which some files have; the larger ones with it.
  if (class_name.empty() && single.class_name == "CLIPTextModel" &&
      names_of(single.weights).contains("text_projection.weight") &&
      single.config.at("hidden_size") > 768) {
    single.class_name = kProjection;
    single.config["architectures"] = {single.class_name};
  }
  return single;
}

void dequantize_when_read(SingleFile& single, io::Dtype dtype) {
  for (const auto& [name, quantized] : single.weights.quantized) {
    single.weights.plain.push_back(quant::dequantized_when_read(quantized, dtype));
    single.weights.plain.back().key = name;
  }
  single.weights.quantized.clear();
}

std::shared_ptr<Model> bind_single_file(SingleFile single, const LoadOptions& options,
                                        const nlohmann::ordered_json& config) {
  const std::string where = single.file->path().string();
  if (!options.variant.empty() || !options.pack.empty()) {
    throw_error<ArgumentError>("{}: a single file has no {}", where,
                               options.variant.empty() ? "lossless pack" : "variant");
  }
  if (config.is_object()) single.config.update(config);
  std::shared_ptr<Model> model;
  try {
    model = make_model(single.class_name, single.config, where);
  } catch (const ArgumentError& error) {  // the file is at fault, not the caller
    throw FormatError(error.what());
  }
  std::optional<at::ScalarType> dtype = options.dtype;
  if (!dtype && single.is_gguf) dtype = at::kBFloat16;
  weights::BindOptions bindings = bind_options(*model, dtype);
  choose_dtypes(bindings, single);
  model->set_binding(bind_stored(*model, std::move(single.weights), std::move(single.metadata),
                                 {single.file}, bindings));
  model->eval();
  if (options.load_now) model->load_weights();
  return model;
}

std::shared_ptr<Model> load_single_file(const std::filesystem::path& path,
                                        const LoadOptions& options, const std::string& class_name,
                                        const nlohmann::ordered_json& config) {
  return bind_single_file(open_single_file(path, class_name), options, config);
}

}  // namespace ferry::models
