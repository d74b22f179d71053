// Binding: which slot of a module is filled from which range of which checkpoint file.
#pragma once

#include <c10/core/StorageImpl.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ferry/base/stop_token.h"
#include "ferry/io/read_engine.h"
#include "ferry/weights/checkpoint.h"
#include "ferry/weights/slot.h"

namespace ferry::weights {

struct BoundSlot {
  Slot slot;
  // The stored tensor: its dtype may differ from the slot's, then reading casts.
  StoredTensor source;
  // The same weight in a lossless pack: who streams may read that instead, where it is faster.
  std::optional<StoredTensor> packed = {};
  // What load_resident() gave the slot, to notice a change: its storage and version.
  c10::weak_intrusive_ptr<c10::StorageImpl> read_storage{c10::intrusive_ptr<c10::StorageImpl>()};
  uint32_t read_version = 0;

  // The weight changed: `changed` holds it from now on, and no pack does.
  void set_source(StoredTensor changed) {
    source = std::move(changed);
    packed.reset();
  }
};

// Whether the slot holds what load_resident() read, unchanged.
bool is_as_read(const BoundSlot& bound);

struct BindOptions {
  // Checkpoint key -> slot name; an empty answer drops the key.
  std::function<std::string(const std::string&)> map_key;
  // The dtype that a slot gets, from its name and the stored dtype. Default: as stored.
  std::function<at::ScalarType(const std::string& slot, at::ScalarType stored)> dtype;
  // Slots that may be absent from the checkpoint without an error, and stay as they are.
  std::function<bool(const std::string& slot)> may_be_missing;
};

// Ownership: keeps the checkpoint's files open and shares the slots' tensors with the module.
struct Binding {
  std::shared_ptr<const Checkpoint> checkpoint;
  std::vector<BoundSlot> slots;
};

// Gives every slot of `root` a stub of its final dtype and notes its source; reads no weight.
// Throws FormatError that lists all missing, unexpected and mis-shaped keys at once.
std::shared_ptr<Binding> bind(const torch::nn::Module& root,
                              std::shared_ptr<const Checkpoint> checkpoint,
                              const BindOptions& options = {});

// Notes where `pack`, a lossless pack of the binding's checkpoint, holds the weights encoded.
void offer_pack(Binding& binding, const Checkpoint& pack);

// Reads the slots that are still stubs, each into memory of its own (the resident way), casting
// where stored and wanted dtype differ, from the pack where there is one. Throws IoError, and
// Cancelled between two tensors after a stop; slots read by then keep their weights.
void load_resident(Binding& binding, io::ReadEngine& engine, const StopToken& stop = {});

// One weight, read into memory of its own, as the slot's dtype; the slot itself is not touched.
at::Tensor read_tensor(const BoundSlot& bound);
at::Tensor read_stored(const StoredTensor& source);

}  // namespace ferry::weights
