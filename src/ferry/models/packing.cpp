#include "ferry/models/packing.h"

#include <unordered_set>

#include "ferry/base/error.h"
#include "ferry/nn/embedding.h"

namespace ferry::models {

weights::PackOptions pack_options(const Model& model) {
  if (!model.binding()) {
    throw_error<ArgumentError>("{}: was made in memory and has no checkpoint to pack",
                               model.class_name());
  }
  std::unordered_set<const c10::TensorImpl*> tables;
  for (const auto& module : model.modules()) {
    if (auto* embedding = dynamic_cast<const nn::Embedding*>(module.get()))
      tables.insert(embedding->weight.unsafeGetTensorImpl());
  }
  std::unordered_set<std::string> keys;
  for (const weights::BoundSlot& bound : model.binding()->slots) {
    if (tables.contains(bound.slot.tensor.unsafeGetTensorImpl())) keys.insert(bound.source.key);
  }
  weights::PackOptions options;
  options.keep_raw = [keys = std::move(keys)](const weights::StoredTensor& tensor) {
    return keys.contains(tensor.key);
  };
  return options;
}

}  // namespace ferry::models
