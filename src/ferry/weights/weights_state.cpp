#include "ferry/weights/weights_state.h"

#include <unordered_map>

#include "ferry/weights/stub.h"

namespace ferry::weights {

bool WeightsState::Content::operator==(const Content& other) const {
  return dtype == other.dtype && file == other.file && offset == other.offset &&
         storage == other.storage && version == other.version;
}

WeightsState::WeightsState(const torch::nn::Module& root, const Binding* binding,
                           const std::function<bool(const BoundSlot&)>& holds_source) {
  std::unordered_map<const c10::TensorImpl*, const BoundSlot*> bound;
  if (binding) {
    for (const BoundSlot& slot : binding->slots)
      bound.emplace(slot.slot.tensor.unsafeGetTensorImpl(), &slot);
  }
  for (const Slot& slot : collect_slots(root)) {
    c10::TensorImpl* tensor = slot.tensor.unsafeGetTensorImpl();
    Content content{.dtype = slot.dtype()};
    const auto found = bound.find(tensor);
    if (found != bound.end() && (is_stub(slot.tensor) || is_as_read(*found->second) ||
                                 (holds_source && holds_source(*found->second)))) {
      content.file = found->second->source.file;
      content.offset = found->second->source.offset;
    } else {
      content.storage = slot.tensor.storage().getWeakStorageImpl();
      content.version = version_of(slot.tensor);
    }
    slots_.push_back(std::move(content));
  }
}

}  // namespace ferry::weights
