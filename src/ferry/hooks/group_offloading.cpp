#include "ferry/hooks/group_offloading.h"

#include <algorithm>
#include <map>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "ferry/base/error.h"
#include "ferry/base/fiber.h"
#include "ferry/base/log.h"
#include "ferry/hooks/recompute.h"
#include "ferry/hooks/row_reader.h"
#include "ferry/nn/embedding.h"
#include "ferry/tensor/dtype.h"
#include "ferry/weights/private_file.h"
#include "ferry/weights/stub.h"

namespace ferry::hooks {

namespace {

constexpr const char* kPassHook = "group_offloading.pass";
constexpr const char* kLeaseHook = "group_offloading.lease";
constexpr const char* kTurnHook = "group_offloading.turn";

// On the root: one run of the component is one pass of the engine.
class PassHook : public nn::ModuleHook {
 public:
  explicit PassHook(offload::Client& client) : client_(client) {}
  void before(nn::Module&) override { client_.begin_pass(); }
  void after(nn::Module&) override { client_.end_pass(true); }
  void failed(nn::Module&) noexcept override { client_.end_pass(false); }
  // A pass that met the end of the device's memory runs once more, with less for weights.
  bool retry(nn::Module&, int failures) override {
    try {
      throw;
    } catch (const c10::OutOfMemoryError& error) {
      return client_.engine().make_room(error, /*again=*/failures > 1);
    } catch (...) {
      return false;
    }
  }
  bool moves_weights() const override { return true; }

 private:
  offload::Client& client_;
};

// On a module that needs groups while it runs. A module may be entered again from within itself.
// `recomputes`: its own code uses the weights, so that a graph cannot be made around it.
class LeaseHook : public nn::ModuleHook {
 public:
  LeaseHook(offload::Client& client, std::vector<size_t> groups, bool recomputes,
            std::shared_ptr<const LockstepTurn> turn)
      : client_(client),
        groups_(std::move(groups)),
        recomputes_(recomputes),
        turn_(std::move(turn)) {}

  void before(nn::Module&) override {
    std::vector<offload::Lease> leases;
    for (size_t group : groups_) leases.push_back(client_.lease(group));
    held_.push_back(std::move(leases));
  }
  void after(nn::Module&) override {
    held_.pop_back();
    // In lockstep the other passes use these groups now (lockstep.h).
    if (*turn_ == LockstepTurn::group) Fiber::yield();
  }
  void failed(nn::Module&) noexcept override { held_.pop_back(); }
  bool wants_recompute() const override { return recomputes_; }
  std::vector<at::Tensor> recompute(nn::Module& module, const std::vector<at::Tensor>& inputs,
                                    const nn::RecomputeBody& body) override {
    return recompute_in_backward(module, inputs, body, [&client = client_, groups = groups_] {
      auto leases = std::make_shared<std::vector<offload::Lease>>();
      for (size_t group : groups) leases->push_back(client.lease(group));
      return leases;
    });
  }

 private:
  offload::Client& client_;
  std::vector<size_t> groups_;
  bool recomputes_;
  std::shared_ptr<const LockstepTurn> turn_;
  std::vector<std::vector<offload::Lease>> held_;
};

// On a block: in lockstep the other passes run it now.
class TurnHook : public nn::ModuleHook {
 public:
  explicit TurnHook(std::shared_ptr<const LockstepTurn> turn) : turn_(std::move(turn)) {}
  void after(nn::Module&) override {
    if (*turn_ == LockstepTurn::block) Fiber::yield();
  }

 private:
  std::shared_ptr<const LockstepTurn> turn_;
};

struct Entry {
  std::string name;    // dotted, "" for the root
  nn::Module* module;  // the nearest ferry module: where the hook goes
  const torch::nn::Module* holder;
};

// All modules below `root`, depth first in registration order. A plain torch::nn module belongs to
// its nearest ferry ancestor, since it has no call point.
void walk(torch::nn::Module& module, const std::string& name, nn::Module* nearest,
          std::vector<Entry>& entries) {
  if (auto* own = dynamic_cast<nn::Module*>(&module)) nearest = own;
  entries.push_back({name, nearest, &module});
  for (const auto& child : module.named_children()) {
    walk(*child.value(), name.empty() ? child.key() : name + "." + child.key(), nearest, entries);
  }
}

bool is_below(const std::string& name, const std::string& ancestor) {
  return ancestor.empty() || name == ancestor || name.starts_with(ancestor + ".");
}

// Which module leases what: the grouping of one root.
class Grouping {
 public:
  Grouping(nn::Module& root, const weights::Binding& binding, const GroupOffloadingConfig& config)
      : config_(config) {
    walk(root, "", &root, entries_);
    for (size_t i = 0; i < binding.slots.size(); ++i) {
      by_tensor_.emplace(binding.slots[i].slot.tensor.unsafeGetTensorImpl(), i);
    }
    binding_ = &binding;
    check_names(config.exclude, "exclude");
    check_names(config.block_modules, "block_modules");
    check_names(config.unused, "unused");
    for (const Entry& entry : entries_) {
      const bool out =
          std::any_of(config_.exclude.begin(), config_.exclude.end(),
                      [&](const std::string& name) { return is_below(entry.name, name); });
      for_own_slots(entry, [&](size_t slot) {
        ++holders_[slot];
        if (out && taken_.insert(slot).second) excluded.push_back(&bound(slot));
      });
    }
  }

  std::vector<offload::Group> groups;
  // In registration order of the hooked modules: the first guess of the order.
  std::vector<std::pair<nn::Module*, std::vector<size_t>>> leases;
  std::vector<const weights::BoundSlot*> excluded;
  std::vector<std::pair<nn::Embedding*, const weights::BoundSlot*>> tables;

  // The blocks of the outermost ModuleLists.
  std::vector<nn::Module*> blocks() const {
    std::vector<nn::Module*> found;
    std::string outer;
    for (const Entry& entry : entries_) {
      if (!dynamic_cast<const nn::ModuleListBase*>(entry.holder)) continue;
      if (!outer.empty() && is_below(entry.name, outer)) continue;
      outer = entry.name;
      for (const auto& child : entry.holder->children()) {
        if (auto* block = dynamic_cast<nn::Module*>(child.get())) found.push_back(block);
      }
    }
    return found;
  }

  // Whether calls are said not to use the module.
  bool unused(const nn::Module* module) const {
    return std::any_of(entries_.begin(), entries_.end(), [&](const Entry& entry) {
      return entry.holder == module &&
             std::any_of(config_.unused.begin(), config_.unused.end(),
                         [&](const std::string& name) { return is_below(entry.name, name); });
    });
  }

  std::optional<size_t> group_of(const weights::BoundSlot& slot) const {
    auto group = group_of_.find(static_cast<size_t>(&slot - binding_->slots.data()));
    return group == group_of_.end() ? std::nullopt : std::optional(group->second);
  }

  // Whether the module's own code uses streamed weights, not only that of modules below it.
  bool uses_groups_itself(const nn::Module& module) const {
    for (const Entry& entry : entries_) {
      bool any = false;
      if (entry.module == &module)
        for_own_slots(entry, [&](size_t slot) { any = any || group_of_.contains(slot); });
      if (any) return true;
    }
    return false;
  }

  // Whether the slot is of an excluded module, whose weights stay in memory.
  bool stays(const weights::BoundSlot& slot) const {
    return std::find(excluded.begin(), excluded.end(), &slot) != excluded.end();
  }

  // With the sources of the slots as they are now.
  void build(uint64_t small_slot_bytes) {
    if (config_.gather_embeddings) find_tables(small_slot_bytes);
    if (config_.offload_type == OffloadType::block_level) add_blocks();
    if (config_.offload_type == OffloadType::leaf_level) {
      for (const Entry& entry : entries_) add_group(entry.name, {entry}, entry.module);
    } else {
      add_top_level();
    }
    std::vector<std::pair<nn::Module*, std::vector<size_t>>> ordered;
    for (const Entry& entry : entries_) {
      auto found = wanted_.find(entry.module);
      if (found == wanted_.end()) continue;
      ordered.emplace_back(entry.module, std::move(found->second));
      wanted_.erase(found);
    }
    leases = std::move(ordered);
  }

 private:
  const weights::BoundSlot& bound(size_t slot) const { return binding_->slots[slot]; }

  void check_names(const std::vector<std::string>& names, const char* option) const {
    for (const std::string& name : names) {
      bool known = std::any_of(entries_.begin(), entries_.end(),
                               [&](const Entry& entry) { return entry.name == name; });
      if (!known) throw_error<ArgumentError>("{}: there is no module named '{}'", option, name);
    }
  }

  template <class F>
  void for_own_slots(const Entry& entry, F&& visit) const {
    auto one = [&](const at::Tensor& tensor) {
      auto found = by_tensor_.find(tensor.unsafeGetTensorImpl());
      if (found != by_tensor_.end()) visit(found->second);
    };
    for (const auto& item : entry.holder->named_parameters(/*recurse=*/false)) one(item.value());
    for (const auto& item : entry.holder->named_buffers(/*recurse=*/false)) one(item.value());
  }

  void find_tables(uint64_t small_slot_bytes) {
    auto embedding_of = [](const Entry& entry) {
      auto* embedding = dynamic_cast<nn::Embedding*>(entry.module);
      return entry.holder == embedding ? embedding : nullptr;
    };
    std::unordered_map<size_t, size_t> users;
    for (const Entry& entry : entries_) {
      if (embedding_of(entry)) for_own_slots(entry, [&](size_t slot) { ++users[slot]; });
    }
    for (const Entry& entry : entries_) {
      nn::Embedding* embedding = embedding_of(entry);
      if (!embedding) continue;
      for_own_slots(entry, [&](size_t slot) {
        if (taken_.contains(slot) && !is_table(slot)) return;  // excluded
        if (bound(slot).slot.size_bytes() < small_slot_bytes) return;
        // A head that is tied to it wants the whole table.
        if (users.at(slot) < holders_.at(slot)) return;
        // Rows of an encoded table cannot be read one by one: it is streamed like any weight.
        if (bound(slot).source.encoding) return;
        tables.emplace_back(embedding, &bound(slot));
        taken_.insert(slot);
      });
    }
  }

  bool is_table(size_t slot) const {
    return std::any_of(tables.begin(), tables.end(),
                       [&](const auto& table) { return table.second == &bound(slot); });
  }

  // A group of the slots that `members` hold themselves and no group has yet; `hooked` leases it.
  // Shared modules and tied weights: a leaf also leases the groups that already hold one of its
  // slots; of blocks, what another one holds too is left to the top level.
  void add_group(const std::string& name, const std::vector<Entry>& members, nn::Module* hooked) {
    const bool leaf = config_.offload_type == OffloadType::leaf_level;
    std::vector<size_t> own;
    std::vector<size_t> others;
    std::unordered_map<size_t, size_t> held;
    for (const Entry& entry : members) for_own_slots(entry, [&](size_t slot) { ++held[slot]; });
    for (const Entry& entry : members) {
      for_own_slots(entry, [&](size_t slot) {
        auto group = group_of_.find(slot);
        if (group != group_of_.end()) {
          if (leaf && group->second != groups.size()) others.push_back(group->second);
        } else if (!leaf && held.at(slot) < holders_.at(slot)) {
          return;
        } else if (taken_.insert(slot).second) {
          own.push_back(slot);
          group_of_[slot] = groups.size();
        }
      });
    }
    std::vector<size_t>& wanted = wanted_[hooked];
    wanted.insert(wanted.end(), others.begin(), others.end());
    if (!own.empty()) {
      offload::Group group{
          name.empty() ? "(root)" : name, {}, !others.empty() || outlasts_others(members, hooked)};
      for (size_t slot : own) group.slots.push_back(bound(slot));
      wanted.push_back(groups.size());
      groups.push_back(std::move(group));
    }
    std::sort(wanted.begin(), wanted.end());
    wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
    if (wanted.empty()) wanted_.erase(hooked);
  }

  // What no block holds: leased by the root for as long as it runs, and by the modules that use it,
  // since those are what a backward runs again.
  void add_top_level() {
    const size_t group = groups.size();
    add_group("top level", entries_, entries_.front().module);
    for (const Entry& entry : entries_) {
      if (entry.module == entries_.front().module) continue;
      for_own_slots(entry, [&](size_t slot) {
        auto found = group_of_.find(slot);
        if (found == group_of_.end() || found->second != group) return;
        std::vector<size_t>& wanted = wanted_[entry.module];
        if (std::find(wanted.begin(), wanted.end(), group) == wanted.end()) wanted.push_back(group);
      });
    }
  }

  // A group that is held while modules below lease theirs: the top level, and parameters that a
  // parent of layers holds itself. (So is one beside a shared group.)
  bool outlasts_others(const std::vector<Entry>& members, nn::Module* hooked) const {
    if (config_.offload_type == OffloadType::block_level) return hooked == entries_.front().module;
    return members.size() == 1 && !members.front().holder->children().empty();
  }

  void add_blocks() {
    std::vector<std::string> lists;
    for (const Entry& entry : entries_) {
      if (!dynamic_cast<const nn::ModuleListBase*>(entry.holder)) continue;
      if (!config_.block_modules.empty()) {
        if (std::find(config_.block_modules.begin(), config_.block_modules.end(), entry.name) ==
            config_.block_modules.end())
          continue;
      } else if (std::any_of(lists.begin(), lists.end(), [&](const std::string& outer) {
                   return is_below(entry.name, outer);
                 })) {
        continue;
      }
      lists.push_back(entry.name);
      add_list(entry);
    }
  }

  void add_list(const Entry& list) {
    const int64_t per_group = std::max<int64_t>(1, config_.num_blocks_per_group);
    std::vector<std::pair<std::string, nn::Module*>> chunk;
    auto flush = [&] {
      if (chunk.empty()) return;
      std::vector<Entry> members;
      for (const Entry& entry : entries_) {
        for (const auto& block : chunk) {
          if (is_below(entry.name, block.first)) members.push_back(entry);
        }
      }
      const size_t group = groups.size();
      add_group(chunk.front().first, members, chunk.front().second);
      if (groups.size() > group) {
        for (size_t i = 1; i < chunk.size(); ++i) wanted_[chunk[i].second].push_back(group);
      }
      chunk.clear();
    };
    for (const auto& child : list.holder->named_children()) {
      auto* block = dynamic_cast<nn::Module*>(child.value().get());
      if (!block) continue;
      chunk.emplace_back(list.name + "." + child.key(), block);
      if (static_cast<int64_t>(chunk.size()) == per_group) flush();
    }
    flush();
  }

  const GroupOffloadingConfig& config_;
  const weights::Binding* binding_ = nullptr;
  std::vector<Entry> entries_;
  std::unordered_map<const c10::TensorImpl*, size_t> by_tensor_;
  std::unordered_map<size_t, size_t> holders_;  // how many modules hold a slot themselves
  std::unordered_set<size_t> taken_;
  std::unordered_map<size_t, size_t> group_of_;
  std::unordered_map<nn::Module*, std::vector<size_t>> wanted_;
};

}  // namespace

GroupOffloading::~GroupOffloading() {
  remove();
}

void GroupOffloading::remove() {
  for (nn::Module* module : hooked_) {
    module->remove_hook(kLeaseHook);
    module->remove_hook(kPassHook);
    module->remove_hook(kTurnHook);
  }
  hooked_.clear();
  for (nn::Module* module : row_sources_)
    static_cast<nn::Embedding*>(module)->set_row_source(nullptr);
  row_sources_.clear();
  client_.reset();
  // Once: the model may be another's by the time this object ends.
  if (!std::exchange(only_in_memory_, false)) return;
  try {
    auto reader = io::make_read_engine();
    weights::load_resident(*binding_, *reader);
  } catch (const std::exception& error) {
    log::error("the weights could not be brought back into memory: {}", error.what());
  }
}

namespace {

void check_options(const GroupOffloadingConfig& config, at::Device device,
                   const std::string& name) {
  if (config.num_blocks_per_group < 1) {
    throw_error<ArgumentError>("{}: num_blocks_per_group is {}; at least 1 is meant", name,
                               config.num_blocks_per_group);
  }
  if (!config.offload_device.is_cpu()) {
    throw_error<ArgumentError>(
        "{}: offload_device is {}; weights wait on the CPU, or on disk with offload_to_disk_path",
        name, config.offload_device.str());
  }
  if (config.onload_device && *config.onload_device != device) {
    throw_error<ArgumentError>("{}: onload_device is {}, but the engine computes on {}", name,
                               config.onload_device->str(), device.str());
  }
}

// Weights that are in memory and are not what the checkpoint holds (changed, or never bound) get a
// source of their own; all give their memory back.
void settle_loaded(weights::Binding& binding, const Grouping& grouping, at::Device device) {
  for (weights::BoundSlot& bound : binding.slots) {
    at::Tensor tensor = bound.slot.tensor;
    const bool stays = grouping.stays(bound);
    if (!weights::is_stub(tensor)) {
      if (!stays && !weights::is_as_read(bound))
        bound.set_source(weights::write_private_file({bound}, {tensor}).front());
    } else if (stays) {
      tensor.set_data(weights::read_tensor(bound));
    }
    if (stays) {
      tensor.set_data(tensor.detach().to(device));
    } else {
      tensor.set_data(weights::make_stub(tensor.sizes(), tensor.scalar_type(), device));
    }
  }
}

// Of a model that was made in memory: every slot, without a source so far.
std::shared_ptr<weights::Binding> bind_memory(nn::Module& root, const std::string& name) {
  auto binding = std::make_shared<weights::Binding>();
  for (const weights::Slot& slot : weights::collect_slots(root)) {
    if (weights::is_stub(slot.tensor)) {
      throw_error<ArgumentError>("{}: '{}' has no weight and no checkpoint to read it from", name,
                                 slot.name());
    }
    weights::BoundSlot bound{slot, {}};
    bound.source.key = slot.name();
    bound.source.shape = slot.shape().vec();
    bound.source.dtype = tensor::from_torch(slot.dtype());
    binding->slots.push_back(std::move(bound));
  }
  return binding;
}

}  // namespace

offload::Lease GroupOffloading::lease(const std::string& name) {
  auto group = groups_.find(name);
  if (group == groups_.end())
    throw_error<ArgumentError>("{}: there is no weight named '{}'", client_->name(), name);
  return group->second ? client_->lease(*group->second) : offload::Lease();
}

weights::WeightsState GroupOffloading::weights_state() const {
  return weights::WeightsState(*hooked_.front(), binding_.get(),
                               [this](const weights::BoundSlot& bound) {
                                 const auto group = groups_.find(bound.slot.name());
                                 return group != groups_.end() && group->second &&
                                        client_->holds_source(*group->second, bound.slot.tensor);
                               });
}

std::shared_ptr<GroupOffloading> apply_group_offloading(nn::Module& root,
                                                        std::shared_ptr<weights::Binding> binding,
                                                        std::shared_ptr<offload::Engine> engine,
                                                        const GroupOffloadingConfig& config,
                                                        const std::string& name) {
  if (root.find_hook(kPassHook)) {
    throw_error<ArgumentError>(
        "{}: group offloading is on already; remove it first to change its options", name);
  }
  const at::Device device = engine->options().device;
  check_options(config, device, name);
  const bool only_in_memory = !binding;
  if (only_in_memory) binding = bind_memory(root, name);

  Grouping grouping(root, *binding, config);
  // From here on it brings back what is in memory only, also where something below fails.
  auto offloading = std::make_shared<GroupOffloading>();
  offloading->engine_ = engine;
  offloading->binding_ = binding;
  offloading->only_in_memory_ = only_in_memory;
  settle_loaded(*binding, grouping, device);
  grouping.build(engine->options().small_slot_bytes);

  offload::ClientOptions options{
      .wrap_around = config.wrap_around,
      .read_ahead = config.use_stream,
      .host_homes = !config.low_cpu_mem_usage && !config.offload_to_disk_path,
      .first_order = {},
      .idle_device = {},
      .source_changed = {}};
  for (const auto& [module, groups] : grouping.leases) {
    if (!grouping.unused(module))
      options.first_order.insert(options.first_order.end(), groups.begin(), groups.end());
  }
  options.source_changed = [binding](const at::Tensor& slot, const weights::StoredTensor& source) {
    for (weights::BoundSlot& bound : binding->slots) {
      if (bound.slot.tensor.is_same(slot)) bound.set_source(source);
    }
  };
  for (const weights::BoundSlot& bound : binding->slots) {
    for (const std::string& slot : bound.slot.names)
      offloading->groups_[slot] = grouping.group_of(bound);
  }
  offloading->client_ =
      std::make_unique<offload::Client>(*engine, name, std::move(grouping.groups), options);
  for (const auto& [embedding, bound] : grouping.tables) {
    embedding->set_row_source(std::make_shared<RowReader>(*bound));
    offloading->row_sources_.push_back(embedding);
  }
  root.add_hook(kPassHook, std::make_shared<PassHook>(*offloading->client_));
  offloading->hooked_.push_back(&root);
  // Before the leases: what is after a block then runs when its weights are free.
  for (nn::Module* block : grouping.blocks()) {
    block->add_hook(kTurnHook, std::make_shared<TurnHook>(offloading->turn_));
    offloading->hooked_.push_back(block);
  }
  for (const auto& [module, groups] : grouping.leases) {
    // Blocks stand for all that is below them; of the root, the modules below lease for themselves.
    const bool recomputes = module != &root || grouping.uses_groups_itself(root);
    module->add_hook(kLeaseHook, std::make_shared<LeaseHook>(*offloading->client_, groups,
                                                             recomputes, offloading->turn_));
    offloading->hooked_.push_back(module);
  }
  return offloading;
}

std::shared_ptr<GroupOffloading> apply_group_offloading(nn::Module& root,
                                                        std::shared_ptr<weights::Binding> binding,
                                                        const GroupOffloadingConfig& config,
                                                        const std::string& name) {
  offload::EngineOptions options;
  options.device = config.onload_device.value_or(at::Device(at::kCPU));
  options.read_ahead = config.use_stream;
  // Host memory for all weights, unless they are to come from disk.
  if (!options.device.is_cpu() && !config.low_cpu_mem_usage && !config.offload_to_disk_path)
    options.host_memory_bytes = offload::EngineOptions::kAllWeights;
  return apply_group_offloading(root, std::move(binding),
                                std::make_shared<offload::Engine>(options), config, name);
}

}  // namespace ferry::hooks
