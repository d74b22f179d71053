#include "ferry/models/quantizing.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "ferry/base/error.h"
#include "ferry/models/stored_binding.h"
#include "ferry/nn/linear.h"
#include "ferry/quant/sqnr.h"
#include "ferry/weights/lossless_pack.h"
#include "ferry/weights/pack_cache.h"
#include "ferry/weights/stub.h"

namespace ferry::models {

namespace {

// As diffusers' TorchAO quantizer: the layer by its name, or by dotted parts that it contains.
bool names_layer(const std::string& pattern, const std::string& layer) {
  return (layer + ".").find(pattern + ".") != std::string::npos;
}

void write_tensor(const at::Tensor& tensor, io::SafetensorsWriter& writer) {
  at::Tensor plain = tensor.contiguous();
  writer.write({static_cast<const std::byte*>(plain.const_data_ptr()), plain.nbytes()});
}

}  // namespace

Quantizing::Quantizing(Model& source, QuantizeOptions options)
    : options_(std::move(options)),
      scheme_(&quant::find_scheme(options_.scheme)),
      binding_(source.binding()) {
  if (!binding_) {
    throw_error<ArgumentError>("{}: was made in memory and has no checkpoint to quantize",
                               source.class_name());
  }
  if (options_.group_size < 0 || (options_.group_size > 0 && !scheme_->takes_group_size)) {
    throw_error<ArgumentError>("group size: got {}, but {} has no groups", options_.group_size,
                               scheme_->name);
  }
  std::vector<std::string> skip = options_.skip;
  for (const std::string& module : source.traits().keep_in_fp32_modules) skip.push_back(module);

  nlohmann::ordered_json config = source.config_json();
  if (config.contains("quantization_config")) {
    throw_error<ArgumentError>("{}: is quantized already; quantize the original",
                               source.class_name());
  }
  config["quantization_config"] =
      quant::quantization_config(*scheme_, options_.group_size, options_.skip, source.dtype());
  target_ = make_model(source.class_name(), config);

  for (const weights::BoundSlot& bound : binding_->slots) {
    for (const std::string& name : bound.slot.names) sources_[name] = &bound;
  }
  std::vector<bool> used(options_.skip.size());
  for (const auto& entry : target_->named_modules("", /*include_self=*/false)) {
    auto* linear = dynamic_cast<nn::Linear*>(entry.value().get());
    if (!linear) continue;
    const std::string& layer = entry.key();
    for (size_t i = 0; i < options_.skip.size(); ++i) {
      if (names_layer(options_.skip[i], layer)) used[i] = true;
    }
    if (std::any_of(skip.begin(), skip.end(),
                    [&](const std::string& pattern) { return names_layer(pattern, layer); })) {
      kept_.emplace_back(layer, "skipped");
      continue;
    }
    auto bound = sources_.find(layer + ".weight");
    if (bound == sources_.end()) continue;
    std::shared_ptr<const quant::QuantizedWeight> weight;
    try {
      weight = scheme_->describe(linear->weight.sizes().vec(), bound->second->slot.dtype(),
                                 options_.group_size);
    } catch (const ArgumentError& error) {
      kept_.emplace_back(layer, error.what());
      continue;
    }
    linear->set_quantized_weight(weight);
    for (const quant::Component& component : weight->components())
      component_slots_.emplace(fmt::format("{}.weight_{}", layer, component.name), layer);
    owners_.emplace(layer, Owner{layer, weight});
  }
  for (size_t i = 0; i < used.size(); ++i) {
    if (!used[i]) {
      throw_error<ArgumentError>("skip: '{}' names no linear layer of {}", options_.skip[i],
                                 source.class_name());
    }
  }
  if (owners_.empty())
    throw_error<ArgumentError>("{}: has no linear layer that fits {}", source.class_name(),
                               scheme_->name);
  for (const weights::Slot& slot : weights::collect_slots(*target_)) {
    if (component_slots_.contains(slot.name())) continue;
    if (auto bound = sources_.find(slot.name()); bound != sources_.end())
      slot.tensor.set_data(weights::make_stub(slot.shape(), bound->second->slot.dtype()));
  }
  recipe_ = fmt::format("quantized: {}, group {}, skip [{}], version 1", scheme_->name,
                        options_.group_size, fmt::join(options_.skip, ", "));
}

const weights::BoundSlot& Quantizing::source_of(const std::string& slot) const {
  auto bound = sources_.find(slot);
  if (bound != sources_.end()) return *bound->second;
  throw_error<ArgumentError>("{}: '{}' has no weight", target_->class_name(), slot);
}

void Quantizing::quantize(const Owner& owner) {
  c10::InferenceMode off(false);
  at::NoGradGuard no_grad;
  const weights::BoundSlot& bound = source_of(owner.layer + ".weight");
  at::Tensor weight = weights::read_tensor(bound);
  std::vector<at::Tensor> components =
      quant::quantize(*scheme_, weight, options_.group_size).components;
  layers_.push_back({owner.layer, weight.nbytes(), owner.weight->size_bytes(),
                     quant::sqnr_db(weight, *owner.weight, components)});
  for (size_t i = 0; i < components.size(); ++i) {
    components_[fmt::format("{}.weight_{}", owner.layer, owner.weight->components()[i].name)] =
        components[i];
  }
  if (options_.on_layer) options_.on_layer(layers_.back(), owners_.size());
}

void Quantizing::write(const weights::Slot& slot, io::SafetensorsWriter& writer) {
  options_.stop.throw_if_stopped();
  auto layer = component_slots_.find(slot.name());
  if (layer == component_slots_.end()) {
    write_tensor(weights::read_tensor(source_of(slot.name())), writer);
    return;
  }
  if (current_ != layer->second) {
    components_.clear();
    current_ = layer->second;
    quantize(owners_.at(current_));
  }
  write_tensor(components_.at(slot.name()), writer);
}

std::shared_ptr<Model> quantize_through_cache(Model& source, const QuantizeOptions& options,
                                              std::optional<at::ScalarType> dtype) {
  Quantizing quantizing(source, options);
  const weights::Checkpoint& checkpoint = *source.binding()->checkpoint;
  weights::PackCache cache;
  weights::CacheContent content;
  content.sources = weights::fingerprint(checkpoint);
  content.recipe = quantizing.recipe();
  content.origin =
      std::filesystem::absolute(checkpoint.files().front()->path()).parent_path().string();
  content.expected_bytes = weights::total_bytes(weights::collect_slots(quantizing.target()));
  content.write = [&](const weights::ByteSink& sink) {
    quantizing.target().write_safetensors(
        [&](const weights::Slot& slot, io::SafetensorsWriter& writer) {
          quantizing.write(slot, writer);
        },
        sink, content.origin);
  };
  auto quantized = weights::Checkpoint::open_file(cache.find_or_make(content, options.stop));
  std::shared_ptr<Model> model = make_model(source.class_name(), quantizing.target().config_json());
  model->set_binding(bind_checkpoint(*model, quantized, dtype));
  return model;
}

}  // namespace ferry::models
