// Models quantized layer by layer: nothing but the layer at hand is in memory.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "ferry/models/model.h"
#include "ferry/quant/registry.h"

namespace ferry::models {

// The quantized twin of a model: its weights are read and quantized as they are written.
class Quantizing {
 public:
  // Quantizes the linear layers of `source` but for those that options name, that the model keeps
  // in float32, and whose shape does not fit the scheme. REQUIRES: `source` comes from load_model()
  // and outlives this. Throws ArgumentError (an unknown scheme, a model that is quantized already,
  // a pattern that skips nothing).
  Quantizing(Model& source, QuantizeOptions options);

  // Of the source's class, all weights stubs, with "quantization_config" in its config: for
  // save_pretrained_from() with write(), or write_safetensors().
  Model& target() { return *target_; }
  // Throws IoError, Cancelled.
  void write(const weights::Slot& slot, io::SafetensorsWriter& writer);

  const std::vector<QuantizedLayer>& layers() const { return layers_; }
  // Linear layers that stay plain, and why.
  const std::vector<std::pair<std::string, std::string>>& kept() const { return kept_; }
  const std::string& recipe() const { return recipe_; }

 private:
  // A component's place: its layer, and which of the layer's components it is.
  struct Owner {
    std::string layer;
    std::shared_ptr<const quant::QuantizedWeight> weight;
  };
  const weights::BoundSlot& source_of(const std::string& slot) const;
  void quantize(const Owner& owner);

  QuantizeOptions options_;
  const quant::Scheme* scheme_;
  std::shared_ptr<weights::Binding> binding_;
  std::shared_ptr<Model> target_;
  // Slot name -> where the source's weight is.
  std::unordered_map<std::string, const weights::BoundSlot*> sources_;
  std::map<std::string, Owner> owners_;                 // by layer
  std::map<std::string, std::string> component_slots_;  // slot -> layer
  std::vector<QuantizedLayer> layers_;
  std::vector<std::pair<std::string, std::string>> kept_;
  std::string recipe_;
  // The layer whose components are being written.
  std::string current_;
  std::map<std::string, at::Tensor> components_;
};

// The quantized twin of `source`, bound to a file in the pack cache, which is made if it is not
// there. dtype: as LoadOptions, of what stays plain. Throws as Quantizing, BudgetError, IoError,
// Cancelled.
std::shared_ptr<Model> quantize_through_cache(Model& source, const QuantizeOptions& options,
                                              std::optional<at::ScalarType> dtype);

}  // namespace ferry::models
