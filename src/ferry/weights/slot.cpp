#include "ferry/weights/slot.h"

#include <unordered_map>

namespace ferry::weights {

namespace {

void collect(const torch::nn::Module& module, const std::string& prefix, std::vector<Slot>& slots,
             std::unordered_map<const c10::TensorImpl*, size_t>& seen) {
  auto add = [&](const std::string& name, const at::Tensor& tensor, bool is_buffer) {
    if (!tensor.defined()) return;
    auto [entry, is_new] = seen.emplace(tensor.unsafeGetTensorImpl(), slots.size());
    if (is_new) {
      slots.push_back({{prefix + name}, tensor, is_buffer});
    } else {
      slots[entry->second].names.push_back(prefix + name);
    }
  };
  for (const auto& entry : module.named_parameters(/*recurse=*/false))
    add(entry.key(), entry.value(), false);
  for (const auto& entry : module.named_buffers(/*recurse=*/false))
    add(entry.key(), entry.value(), true);
  for (const auto& child : module.named_children()) {
    collect(*child.value(), prefix + child.key() + ".", slots, seen);
  }
}

}  // namespace

std::vector<Slot> collect_slots(const torch::nn::Module& root) {
  std::vector<Slot> slots;
  std::unordered_map<const c10::TensorImpl*, size_t> seen;
  collect(root, "", slots, seen);
  return slots;
}

uint32_t version_of(const at::Tensor& tensor) {
  const auto& counter = tensor.unsafeGetTensorImpl()->version_counter();
  return counter.enabled() ? counter.current_version() : 0;
}

uint64_t total_bytes(const std::vector<Slot>& slots) {
  uint64_t sum = 0;
  for (const Slot& slot : slots) sum += slot.size_bytes();
  return sum;
}

}  // namespace ferry::weights
