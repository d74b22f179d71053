// Group offloading: attaches the engine's leases to a module's call points. The options keep the
// names of diffusers' apply_group_offloading (hooks/group_offloading.py).
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "ferry/nn/module.h"
#include "ferry/offload/engine.h"
#include "ferry/weights/binding.h"
#include "ferry/weights/weights_state.h"

namespace ferry::hooks {

enum class OffloadType {
  block_level,  // num_blocks_per_group blocks of a ModuleList move together; the rest is one group
  leaf_level,   // each module that holds weights of its own moves alone: least memory
};

// diffusers' arguments, by its names, and below them what ferry adds. Options that diffusers has to
// restrict work together here: any number of blocks a group with streams, disk with any dtype,
// prefetching on a CPU-only machine.
struct GroupOffloadingConfig {
  OffloadType offload_type = OffloadType::leaf_level;
  int64_t num_blocks_per_group = 1;
  // Where compute happens. Unset: the engine's device, or the CPU where no engine is given.
  std::optional<at::Device> onload_device = {};
  // Where groups wait: the CPU, that is pinned host memory, or the checkpoint on disk where compute
  // is on the CPU too or a folder is given below. Another device is refused.
  at::Device offload_device = at::Device(at::kCPU);
  // Bring groups ahead of the compute. Off: each group when it is needed.
  bool use_stream = true;
  // Accepted for compatibility; copies never block the host, and the arena is never freed under a
  // stream, so there is nothing to choose.
  bool non_blocking = true;
  bool record_stream = false;
  // Keep no copy of the weights in host memory: every group comes from disk.
  bool low_cpu_mem_usage = false;
  // Groups come from disk: from the checkpoint the model was loaded from, which is not rewritten;
  // weights that no longer equal it go to a file without a name in this folder's place, the cache
  // folder.
  std::optional<std::filesystem::path> offload_to_disk_path = {};
  // Names of the ModuleLists that count as blocks (dotted, below the root); empty: all outermost.
  std::vector<std::string> block_modules = {};
  // Names of modules (dotted) whose weights stay in memory.
  std::vector<std::string> exclude = {};

  // Names of modules (dotted) that the calls to come do not use (Model::unused_modules()): they are
  // not brought before the first pass has shown the order. A call that uses them gets them.
  std::vector<std::string> unused = {};
  // Read the next pass's first groups during this pass's last ones.
  bool wrap_around = true;
  // Gather the rows that are used of embedding tables from disk instead of streaming the table.
  bool gather_embeddings = true;
};

// Where passes in lockstep (lockstep.h) hand over to each other.
enum class LockstepTurn {
  group,  // at each group: no more weights at once than one pass needs
  block,  // at each block of the outermost ModuleLists: a whole block's weights are kept meanwhile,
          // but a pass that waits holds no more activations than lie between two blocks
};

// What is attached to one root module. Keeps engine and binding alive. remove() or destruction
// detaches; then every streamed slot is a stub that the binding can fill, or holds its weight again
// where there is no checkpoint. Must not outlive the root module.
class GroupOffloading {
 public:
  ~GroupOffloading();
  void remove();
  offload::Client& client() { return *client_; }
  // Holds the group of one parameter or buffer (dotted name), to read or change it outside of a
  // forward; nothing for one that stays in memory. Throws ArgumentError if there is no such name,
  // and as Client::lease().
  offload::Lease lease(const std::string& name);
  // Of the root's weights, wherever they are now. REQUIRES: not removed.
  weights::WeightsState weights_state() const;
  const std::shared_ptr<offload::Engine>& engine() const { return engine_; }
  // For run_lockstep().
  void set_lockstep_turn(LockstepTurn turn) { *turn_ = turn; }

 private:
  friend std::shared_ptr<GroupOffloading> apply_group_offloading(nn::Module&,
                                                                 std::shared_ptr<weights::Binding>,
                                                                 std::shared_ptr<offload::Engine>,
                                                                 const GroupOffloadingConfig&,
                                                                 const std::string&);
  std::shared_ptr<offload::Engine> engine_;
  std::shared_ptr<weights::Binding> binding_;
  std::unique_ptr<offload::Client> client_;
  bool only_in_memory_ = false;  // the weights have no checkpoint: remove() reads them back
  std::unordered_map<std::string, std::optional<size_t>> groups_;  // by slot name
  std::shared_ptr<LockstepTurn> turn_ = std::make_shared<LockstepTurn>(LockstepTurn::group);
  std::vector<nn::Module*> hooked_;  // the root first
  std::vector<nn::Module*> row_sources_;
};

// Streams the weights of `root` from the checkpoint they are bound to. Weights that were changed
// since they were read, and those of a model without a checkpoint (`binding` null), are written to
// a file without a name first, and come from there. Throws BudgetError stating the least budget,
// ArgumentError (offloading is on already; a name of a module that does not
// exist; weights that are nowhere; options that mean nothing), IoError.
std::shared_ptr<GroupOffloading> apply_group_offloading(nn::Module& root,
                                                        std::shared_ptr<weights::Binding> binding,
                                                        std::shared_ptr<offload::Engine> engine,
                                                        const GroupOffloadingConfig& config = {},
                                                        const std::string& name = "model");

// The same with an engine of its own that holds no more than it must: the groups that are always
// needed, the largest other one, and with `use_stream` as much again to read ahead.
std::shared_ptr<GroupOffloading> apply_group_offloading(nn::Module& root,
                                                        std::shared_ptr<weights::Binding> binding,
                                                        const GroupOffloadingConfig& config,
                                                        const std::string& name = "model");

}  // namespace ferry::hooks
