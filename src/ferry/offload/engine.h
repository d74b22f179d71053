// The engine: streams groups of weights from their checkpoint into memory, ahead of the compute and
// under a byte budget. Knows slots and groups; no modules.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ferry/base/stop_token.h"
#include "ferry/io/read_engine.h"
#include "ferry/offload/arena.h"
#include "ferry/offload/plan.h"
#include "ferry/weights/binding.h"

namespace ferry {
class Trace;
}

namespace ferry::offload {

class Client;

// The slots that are leased together.
struct Group {
  std::string name;
  std::vector<weights::BoundSlot> slots;
  // Leased while other groups come and go, so it is planned resident.
  bool keep_resident = false;
};

struct EngineOptions {
  // What all weights may take together: small ones, residents and the arena. Bytes.
  uint64_t weights_memory_bytes = 0;
  // See PlanOptions. 0 keeps its default.
  uint64_t preferred_arena_bytes = 0;
  // Slots below this stay in memory from the start: a seek for each would cost more than they
  // weigh.
  uint64_t small_slot_bytes = 16 << 10;
  // Off reads each group when it is leased (for tests and for measuring what reading ahead gains).
  bool read_ahead = true;
  io::ReadEngineOptions read = {};
  StopToken stop = {};
  // Not owned; null is off.
  Trace* trace = nullptr;
};

struct ClientOptions {
  // Read the next pass's first groups while this pass's last ones compute. Off for components that
  // run once (text encoders).
  bool wrap_around = true;
  // The groups in the order in which a pass is expected to lease them; empty: each once, in order.
  std::vector<size_t> first_order = {};
};

struct Report {
  uint64_t bytes_read = 0;
  uint64_t leases = 0;
  uint64_t hits = 0;            // the group was there, or on its way, when it was leased
  uint64_t misses = 0;          // it had to be asked for
  uint64_t dropped = 0;         // read ahead and not used
  double stall_seconds = 0;     // waiting for reads at a lease
  uint64_t resident_bytes = 0;  // of the active component
  uint64_t arena_bytes = 0;
  uint64_t small_bytes = 0;  // of all components
  uint64_t peak_bytes = 0;   // the most of small + residents + arena ever held
};

// Holds a group where compute happens. Move-only; may outlive neither engine nor client.
class Lease {
 public:
  Lease() = default;
  Lease(Lease&& other) noexcept;
  Lease& operator=(Lease&& other) noexcept;
  ~Lease() { release(); }
  void release() noexcept;

 private:
  friend class Client;
  Lease(Client* client, size_t group) : client_(client), group_(group) {}
  Client* client_ = nullptr;
  size_t group_ = 0;
};

// Shared by the components of one or more pipelines; one component is active at a time, and what
// the others held is released when another becomes active. Thread-safe: calls are serialised.
// Passed in, never global. Must outlive its clients.
class Engine {
 public:
  explicit Engine(EngineOptions options);
  ~Engine();

  const EngineOptions& options() const { return options_; }
  const io::ReadEngine& read_engine() const { return *reader_; }
  Report report() const;
  // Drops what is read ahead and resident of all components that have no lease out.
  void unload();
  void set_stop_token(StopToken stop);

 private:
  friend class Client;
  void activate_locked(Client& client);

  EngineOptions options_;
  std::unique_ptr<io::ReadEngine> reader_;
  mutable std::mutex mutex_;
  Client* active_ = nullptr;
  std::vector<Client*> clients_;
  Report report_;
  uint64_t held_small_ = 0;
};

// One component's groups on an engine. The first order is a guess; the order that a pass really had
// is recorded and replaces it.
// Ownership: keeps the slots' tensors; on destruction every slot is a stub again.
class Client {
 public:
  // Reads the small slots. Throws BudgetError if the groups cannot be streamed under the budget,
  // stating the least that would do; IoError.
  Client(Engine& engine, std::string name, std::vector<Group> groups,
         const ClientOptions& options = {});
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  // Waits until the group's slots hold their weights. Leases nest, also of one group. Throws
  // IoError (a failed read, a checkpoint that changed), Cancelled, BudgetError (more is leased at
  // once than the budget holds).
  Lease lease(size_t group);
  // Around one run of the component (a step); what is leased between them is the order.
  void begin_pass();
  void end_pass(bool completed = true);
  // Gives back all that is not leased.
  void unload();

  const Plan& plan() const { return plan_; }
  const std::string& name() const { return name_; }
  size_t group_count() const { return states_.size(); }

 private:
  friend class Engine;
  friend class Lease;
  struct State;
  struct Pending {  // a predicted use whose group is here or on its way
    size_t group;
    size_t position;       // in order_
    uint32_t skipped = 0;  // leases that came before it against the prediction
  };

  void release(size_t group) noexcept;
  void load_small_slots();
  void plan_locked();
  void activate_locked();
  void deactivate_locked() noexcept;
  // Asks for the predicted groups in turn, as long as there is room.
  void read_ahead_locked();
  // Reserves memory for an absent group and submits its reads; false if there is no room.
  bool start_locked(State& state);
  void start_or_evict_locked(State& state);
  // Waits for the reads of a loading group and makes the views. Throws; then the group is absent.
  void arrive_locked(State& state);
  void drop_locked(State& state) noexcept;
  void drop_if_unused_locked(State& state) noexcept;
  // Takes back the prediction that hurts least; false if there is none.
  bool evict_one_locked();
  void forget_predictions_locked() noexcept;
  void adopt_order_locked(std::vector<size_t> order);

  Engine& engine_;
  std::string name_;
  ClientOptions options_;
  std::vector<std::unique_ptr<State>> states_;
  Arena arena_;  // empty while another component is active
  Plan plan_;
  uint64_t small_bytes_ = 0;

  std::vector<size_t> order_;
  bool order_is_guess_ = true;
  size_t cursor_ = 0;  // the next of order_ to be asked for
  std::deque<Pending> pending_;
  std::vector<size_t> recording_;
  int pass_depth_ = 0;
};

}  // namespace ferry::offload
