// Whether a module's weights are still what they were: for what was computed from them and is kept.
#pragma once

#include <c10/core/StorageImpl.h>

#include <functional>
#include <memory>
#include <vector>

#include "ferry/weights/binding.h"

namespace ferry::weights {

// What fills each slot of a module at one moment: a range of a checkpoint's file, or memory of its
// own in some version. Equal states are equal weights; the reverse need not hold. Keeps files open
// and no weight alive. A plain value.
class WeightsState {
 public:
  WeightsState() = default;
  // `binding` may be null. A slot stands for its source if it is a stub, if it holds what was read,
  // or if `holds_source` says so: group offloading knows of weights that come and go.
  explicit WeightsState(const torch::nn::Module& root, const Binding* binding,
                        const std::function<bool(const BoundSlot&)>& holds_source = {});

  bool operator==(const WeightsState& other) const = default;

 private:
  struct Content {
    at::ScalarType dtype;
    std::shared_ptr<const io::File> file = {};  // null for memory
    uint64_t offset = 0;
    // Weak: the address of a storage that is gone is not given to another one.
    c10::weak_intrusive_ptr<c10::StorageImpl> storage{c10::intrusive_ptr<c10::StorageImpl>()};
    uint32_t version = 0;

    bool operator==(const Content& other) const;
  };
  std::vector<Content> slots_;
};

}  // namespace ferry::weights
