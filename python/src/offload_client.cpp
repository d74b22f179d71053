#include "offload_client.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/tensor/dtype.h"
#include "ferry/weights/stub.h"

namespace ferry::python {

OffloadClient::OffloadClient(std::shared_ptr<OwnedEngine> engine, const std::string& name,
                             std::vector<GroupDescription> groups,
                             const offload::ClientOptions& options, weights::PrivateHome home)
    : engine_(std::move(engine)) {
  c10::InferenceMode off(false);
  const at::Device device = options.idle_device.value_or(engine_->engine->options().device);
  std::vector<offload::Group> own;
  try {
    for (GroupDescription& described : groups) {
      const size_t first = binding_.slots.size();
      std::vector<weights::BoundSlot> homeless;
      std::vector<size_t> where;
      std::vector<at::Tensor> values;
      uint64_t bytes = 0;
      for (size_t i = 0; i < described.slots.size(); ++i) {
        auto& [slot_name, tensor] = described.slots[i];
        weights::BoundSlot bound{{{slot_name}, tensor}, {}};
        bytes += bound.slot.size_bytes();
        if (described.sources[i]) {
          bound.source = *described.sources[i];
          bound_bytes_ += bound.slot.size_bytes();
        } else {
          where.push_back(binding_.slots.size());
          homeless.push_back(bound);
          values.push_back(tensor);
        }
        binding_.slots.push_back(std::move(bound));
      }
      const auto stored = weights::write_private_file(homeless, values, home);
      values.clear();
      for (size_t i = 0; i < stored.size(); ++i) binding_.slots[where[i]].source = stored[i];
      offload::Group group{described.name, {}, described.keep_resident};
      for (size_t i = first; i < binding_.slots.size(); ++i) {
        weights::BoundSlot& bound = binding_.slots[i];
        bound.slot.tensor.set_data(
            weights::make_stub(bound.slot.shape(), bound.slot.dtype(), device));
        group.slots.push_back(bound);
      }
      own.push_back(std::move(group));
      names_.push_back(described.name);
      bytes_.push_back(bytes);
    }
    offload::ClientOptions with_sources = options;
    with_sources.source_changed = [this](const at::Tensor& slot,
                                         const weights::StoredTensor& source) {
      for (weights::BoundSlot& bound : binding_.slots) {
        if (bound.slot.tensor.is_same(slot)) bound.set_source(source);
      }
    };
    client_ =
        std::make_unique<offload::Client>(*engine_->engine, name, std::move(own), with_sources);
  } catch (...) {
    try {
      restore();
    } catch (const std::exception& error) {
      log::error("{}: the weights could not be brought back into memory: {}", name, error.what());
    }
    throw;
  }
}

OffloadClient::~OffloadClient() = default;

offload::Client& OffloadClient::client() const {
  if (!client_) throw ArgumentError("offloading was removed from this module");
  return *client_;
}

void OffloadClient::remove() {
  client_.reset();
  restore();
}

std::vector<std::pair<at::Tensor, weights::StoredTensor>> OffloadClient::withdraw() {
  client_.reset();
  std::vector<std::pair<at::Tensor, weights::StoredTensor>> left;
  for (const weights::BoundSlot& bound : binding_.slots) {
    if (weights::is_stub(bound.slot.tensor)) left.emplace_back(bound.slot.tensor, bound.source);
  }
  return left;
}

void OffloadClient::restore() {
  c10::InferenceMode off(false);
  for (weights::BoundSlot& bound : binding_.slots) {
    at::Tensor tensor = bound.slot.tensor;
    if (!weights::is_stub(tensor)) {
      if (!tensor.device().is_cpu()) tensor.set_data(tensor.detach().to(at::kCPU));
    } else if (!tensor.device().is_cpu()) {
      tensor.set_data(weights::make_stub(tensor.sizes(), tensor.scalar_type()));
    }
  }
  auto reader = io::make_read_engine();
  weights::load_resident(binding_, *reader);
}

uint64_t OffloadClient::total_bytes() const {
  uint64_t bytes = 0;
  for (uint64_t one : bytes_) bytes += one;
  return bytes;
}

}  // namespace ferry::python
