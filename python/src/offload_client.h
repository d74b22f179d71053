// What a Python module's hooks hold: a client of an engine, and where each of its weights is.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "ferry/base/trace.h"
#include "ferry/offload/engine.h"
#include "ferry/weights/private_file.h"

namespace ferry::python {

struct OwnedEngine {
  std::shared_ptr<Trace> trace;  // outlives the engine
  std::shared_ptr<offload::Engine> engine;
};

// A group as Python describes it. Slots without a source are in memory and are moved out of it.
struct GroupDescription {
  std::string name;
  std::vector<std::pair<std::string, at::Tensor>> slots;
  std::vector<std::optional<weights::StoredTensor>> sources;
  bool keep_resident = false;
};

// Ownership: keeps the engine and the tensors of its slots.
class OffloadClient {
 public:
  // Every slot becomes a stub on `options.idle_device`. Weights without a source are written to
  // `home` group by group. Throws as Client's constructor, after giving the weights back.
  OffloadClient(std::shared_ptr<OwnedEngine> engine, const std::string& name,
                std::vector<GroupDescription> groups, const offload::ClientOptions& options,
                weights::PrivateHome home);
  ~OffloadClient();

  offload::Client& client() const;
  bool removed() const { return client_ == nullptr; }
  // Every slot holds its weight again, in CPU memory of its own. Throws IoError; a further call
  // goes on where it stopped.
  void remove();
  // The client ends, and slots that are stubs stay so: where the weight of each is. `remove` still
  // brings them into memory.
  std::vector<std::pair<at::Tensor, weights::StoredTensor>> withdraw();
  const std::shared_ptr<OwnedEngine>& engine() const { return engine_; }
  // Bytes of all slots, and of those that come from files that were there before.
  uint64_t total_bytes() const;
  uint64_t bound_bytes() const { return bound_bytes_; }
  std::vector<std::string> group_names() const { return names_; }
  std::vector<uint64_t> group_bytes() const { return bytes_; }

 private:
  void restore();

  std::shared_ptr<OwnedEngine> engine_;
  weights::Binding binding_;
  std::vector<std::string> names_;
  std::vector<uint64_t> bytes_;
  uint64_t bound_bytes_ = 0;
  std::unique_ptr<offload::Client> client_;
};

}  // namespace ferry::python
