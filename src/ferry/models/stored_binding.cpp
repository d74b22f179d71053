#include "ferry/models/stored_binding.h"

#include <fmt/ranges.h>

#include <unordered_map>
#include <unordered_set>

#include "ferry/base/error.h"
#include "ferry/models/bind_options.h"
#include "ferry/nn/linear.h"
#include "ferry/tensor/dtype.h"

namespace ferry::models {

namespace {

// The linear layers of a model by the names of their weights.
std::unordered_map<std::string, nn::Linear*> linear_layers(const Model& model) {
  std::unordered_map<std::string, nn::Linear*> layers;
  for (const auto& entry : model.named_modules("", /*include_self=*/false)) {
    if (auto* linear = dynamic_cast<nn::Linear*>(entry.value().get()))
      layers.emplace(entry.key() + ".weight", linear);
  }
  return layers;
}

void set_weight(nn::Linear& layer, const std::string& name, const quant::StoredQuantized& stored) {
  const at::IntArrayRef got = stored.weight->shape();
  if (got != at::IntArrayRef({layer.out_features(), layer.in_features()})) {
    throw_error<FormatError>("{}: '{}', stored as {}: got [{}], expected [{}, {}]",
                             stored.components.front().file->path().string(), name,
                             stored.weight->scheme(), fmt::join(got.begin(), got.end(), ", "),
                             layer.out_features(), layer.in_features());
  }
  layer.set_quantized_weight(stored.weight);
}

}  // namespace

std::shared_ptr<weights::Binding> bind_stored(Model& model, quant::StoredWeights stored,
                                              std::map<std::string, std::string> metadata,
                                              std::vector<std::shared_ptr<const io::File>> files,
                                              const weights::BindOptions& options) {
  auto map_key = [&](const std::string& key) {
    return options.map_key ? options.map_key(key) : key;
  };
  std::vector<weights::StoredTensor> tensors = std::move(stored.plain);
  std::unordered_set<std::string> keys;
  for (const weights::StoredTensor& tensor : tensors) keys.insert(tensor.key);

  const auto layers = linear_layers(model);
  // Checkpoint key of a component -> slot name.
  std::unordered_map<std::string, std::string> components;
  for (const auto& [stored_name, weight] : stored.quantized) {
    const std::string name = map_key(stored_name);
    if (name.empty()) continue;
    auto layer = layers.find(name);
    if (layer == layers.end()) {
      const at::ScalarType wanted = options.dtype ? options.dtype(name, at::kFloat) : at::kBFloat16;
      weights::StoredTensor tensor =
          quant::dequantized_when_read(weight, tensor::from_torch(wanted));
      tensor.key = stored_name;
      tensors.push_back(std::move(tensor));
      continue;
    }
    set_weight(*layer->second, name, weight);
    for (size_t i = 0; i < weight.components.size(); ++i) {
      weights::StoredTensor tensor = weight.components[i];
      const std::string slot = name + "_" + weight.weight->components()[i].name;
      // Rows cut out of one tensor share its key.
      if (!keys.insert(tensor.key).second) tensor.key = slot;
      components.emplace(tensor.key, slot);
      tensors.push_back(std::move(tensor));
    }
  }

  weights::BindOptions inner = options;
  inner.map_key = [&](const std::string& key) {
    auto component = components.find(key);
    return component == components.end() ? map_key(key) : component->second;
  };
  if (options.dtype) {
    std::unordered_set<std::string> kept;
    for (const auto& [key, slot] : components) kept.insert(slot);
    inner.dtype = [kept = std::move(kept), outer = options.dtype](const std::string& slot,
                                                                  at::ScalarType dtype) {
      return kept.contains(slot) ? dtype : outer(slot, dtype);
    };
  }
  return weights::bind(
      model,
      weights::Checkpoint::of_tensors(std::move(tensors), std::move(metadata), std::move(files)),
      inner);
}

std::shared_ptr<weights::Binding> bind_checkpoint(
    Model& model, std::shared_ptr<const weights::Checkpoint> checkpoint,
    std::optional<at::ScalarType> dtype) {
  const nlohmann::ordered_json config = model.config_json();
  const auto quantization = config.find("quantization_config");
  quant::StoredWeights stored = quant::read_weights(
      *checkpoint, quantization == config.end() ? nlohmann::ordered_json() : *quantization);
  const weights::BindOptions options = bind_options(model, dtype);
  if (stored.quantized.empty()) return weights::bind(model, std::move(checkpoint), options);
  return bind_stored(model, std::move(stored), checkpoint->metadata(), checkpoint->files(),
                     options);
}

}  // namespace ferry::models
