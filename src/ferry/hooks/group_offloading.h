// Group offloading: attaches the engine's leases to a module's call points. The options keep the
// names of diffusers' apply_group_offloading (hooks/group_offloading.py).
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ferry/nn/module.h"
#include "ferry/offload/engine.h"
#include "ferry/weights/binding.h"

namespace ferry::hooks {

enum class OffloadType {
  block_level,  // num_blocks_per_group blocks of a ModuleList move together; the rest is one group
  leaf_level,   // each module that holds weights of its own moves alone: least memory
};

struct GroupOffloadingConfig {
  OffloadType offload_type = OffloadType::leaf_level;
  int64_t num_blocks_per_group = 1;
  // Names of the ModuleLists that count as blocks (dotted, below the root); empty: all outermost.
  std::vector<std::string> block_modules = {};
  // Names of modules (dotted) whose weights stay in memory.
  std::vector<std::string> exclude = {};
  // Read the next pass's first groups during this pass's last ones.
  bool wrap_around = true;
  // Gather the rows that are used of embedding tables from disk instead of streaming the table.
  bool gather_embeddings = true;
};

// What is attached to one root module. Keeps engine and binding alive. remove() or destruction
// detaches; then every streamed slot is a stub. Must not outlive the root module.
class GroupOffloading {
 public:
  ~GroupOffloading();
  void remove();
  offload::Client& client() { return *client_; }
  const std::shared_ptr<offload::Engine>& engine() const { return engine_; }

 private:
  friend std::shared_ptr<GroupOffloading> apply_group_offloading(nn::Module&,
                                                                 std::shared_ptr<weights::Binding>,
                                                                 std::shared_ptr<offload::Engine>,
                                                                 const GroupOffloadingConfig&,
                                                                 const std::string&);
  std::shared_ptr<offload::Engine> engine_;
  std::shared_ptr<weights::Binding> binding_;
  std::unique_ptr<offload::Client> client_;
  std::vector<nn::Module*> hooked_;
  std::vector<nn::Module*> row_sources_;
};

// Streams the weights of `root` from the checkpoint they are bound to. The weights must not have
// been changed since they were read (they would be read again from the checkpoint). Throws
// BudgetError stating the least budget, ArgumentError (offloading is on already; a name in
// `exclude` or `block_modules` that does not exist), IoError.
std::shared_ptr<GroupOffloading> apply_group_offloading(nn::Module& root,
                                                        std::shared_ptr<weights::Binding> binding,
                                                        std::shared_ptr<offload::Engine> engine,
                                                        const GroupOffloadingConfig& config = {},
                                                        const std::string& name = "model");

}  // namespace ferry::hooks
