// Weights that change while they are offloaded: noticed, and kept in a file of their own.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/offload/carrier.h"
#include "ferry/offload/client_state.h"
#include "ferry/offload/engine.h"
#include "ferry/weights/private_file.h"
#include "ferry/weights/stub.h"

namespace ferry::offload {

namespace {

bool same_bytes(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes() || a.device() != b.device() ||
      !a.is_contiguous())
    return false;
  c10::InferenceMode off(false);
  at::NoGradGuard no_grad;
  return at::equal(a.detach().reshape(-1).view(at::kByte), b.reshape(-1).view(at::kByte));
}

}  // namespace

bool Client::was_replaced_locked(const State& state) const {
  if (state.attached) return false;
  for (const Piece& piece : state.pieces) {
    for (const SlotPlace& slot : piece.slots) {
      if (!weights::is_stub(slot.tensor)) return true;
    }
  }
  return false;
}

bool Client::was_changed_locked(const State& state) const {
  size_t i = 0;
  for (const Piece& piece : state.pieces) {
    for (size_t j = 0; j < piece.slots.size(); ++j, ++i) {
      const at::Tensor& tensor = piece.slots[j].tensor;
      const at::Tensor& view = piece.views[j];
      if (weights::version_of(tensor) != state.versions[i]) return true;
      if (tensor.storage().unsafeGetStorageImpl() == view.storage().unsafeGetStorageImpl())
        continue;
      // Cast and cast back, as layerwise casting does around a layer, is no change.
      if (!same_bytes(tensor, view)) return true;
    }
  }
  return false;
}

bool Client::holds_source(size_t group, const at::Tensor& slot) const {
  std::lock_guard lock(engine_.mutex_);
  const State& state = *states_.at(group);
  const bool moves =
      std::any_of(state.group.slots.begin(), state.group.slots.end(),
                  [&](const weights::BoundSlot& bound) { return bound.slot.tensor.is_same(slot); });
  return moves && !was_replaced_locked(state) && !(state.attached && was_changed_locked(state));
}

void Client::save_changed_locked(State& state) {
  std::vector<at::Tensor> values;
  for (weights::BoundSlot& bound : state.group.slots) {
    at::Tensor value = bound.slot.tensor.detach();
    // Slots of the group that nobody replaced come from where they came from so far.
    if (weights::is_stub(value)) value = weights::read_tensor(bound);
    if (value.sizes() != at::IntArrayRef(bound.source.shape)) {
      throw_error<ArgumentError>("{}: the weight that replaced it has another shape",
                                 bound.slot.name());
    }
    values.push_back(value);
  }
  std::vector<weights::StoredTensor> stored =
      weights::write_private_file(state.group.slots, values);
  drop_locked(state, /*forget_host=*/true);
  for (size_t i = 0; i < stored.size(); ++i) {
    weights::BoundSlot& bound = state.group.slots[i];
    bound.set_source(stored[i]);
    bound.slot.tensor.set_data(
        weights::make_stub(bound.slot.shape(), values[i].scalar_type(), idle_device()));
    if (options_.source_changed) options_.source_changed(bound.slot.tensor, bound.source);
  }
  std::vector<bool> homes;
  for (const Piece& piece : state.pieces) homes.push_back(piece.host_home);
  auto footprint = [&] {
    uint64_t bytes = 0;
    for (const Piece& piece : state.pieces)
      bytes += piece.arriving_footprint(!engine_.options_.device.is_cpu());
    return bytes;
  };
  const uint64_t before = footprint();
  make_pieces_locked(state);
  if (footprint() > before) {
    plan_is_stale_ = true;
  } else if (state.pieces.size() == homes.size()) {
    for (size_t i = 0; i < homes.size(); ++i) state.pieces[i].host_home = homes[i];
  }
  ++engine_.report_.changed;
}

void Client::hold_changed_locked(State& state) noexcept {
  try {
    c10::InferenceMode off(false);
    at::NoGradGuard no_grad;
    std::vector<at::Tensor> values;
    for (const weights::BoundSlot& bound : state.group.slots)
      values.push_back(bound.slot.tensor.detach().clone());
    drop_locked(state, /*forget_host=*/true);
    for (size_t i = 0; i < values.size(); ++i) {
      at::Tensor slot = state.group.slots[i].slot.tensor;
      slot.set_data(values[i]);
    }
  } catch (const std::exception& error) {
    log::error("{}: {} could not be copied either ({}): it goes back to what it was", name_,
               state.group.name, error.what());
  }
}

}  // namespace ferry::offload
