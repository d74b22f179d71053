// The engine: streams groups of weights from disk, or from pinned host memory, to where compute
// happens, ahead of the compute and under a byte budget. Knows slots and groups; no modules.
#pragma once

#include <c10/core/Device.h>

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "ferry/base/stop_token.h"
#include "ferry/io/read_engine.h"
#include "ferry/offload/arena.h"
#include "ferry/offload/plan.h"
#include "ferry/offload/turn.h"
#include "ferry/weights/binding.h"

namespace ferry {
class Trace;
}

namespace c10 {
class OutOfMemoryError;
}

namespace ferry::offload {

class Carrier;
enum class Urgency;
class Client;
class Engine;

// The slots that are leased together.
struct Group {
  std::string name;
  std::vector<weights::BoundSlot> slots;
  // Leased while other groups come and go, so it is planned resident.
  bool keep_resident = false;
};

struct EngineOptions {
  static constexpr uint64_t kAllWeights = UINT64_MAX;

  // Where compute happens. On the CPU reads land where the parameters alias them; on an accelerator
  // they pass through pinned host memory.
  at::Device device = at::Device(at::kCPU);
  // What all weights may take where compute happens: small ones, residents and what streams. Bytes.
  // 0: as little as each component can do with, and as much again as its largest group takes to
  // read ahead.
  uint64_t weights_memory_bytes = 0;
  // Pinned host memory on an accelerator: staging for reads, and what is left of it holds groups
  // that then need no disk. Bytes; 0 is what staging needs, kAllWeights has room for them all.
  uint64_t host_memory_bytes = 0;
  // See PlanOptions. 0 keeps its default.
  uint64_t preferred_arena_bytes = 0;
  // Slots below this stay in memory from the start: a seek for each would cost more than they
  // weigh.
  uint64_t small_slot_bytes = 16 << 10;
  // About how much travels as one piece. Smaller pieces fill the arena better, larger ones cost
  // fewer requests.
  uint64_t piece_bytes = 32 << 20;
  // Off brings each group when it is leased (for tests and for measuring what reading ahead gains).
  bool read_ahead = true;
  // Plan again with the times of the first passes.
  bool replan = true;
  io::ReadEngineOptions read = {};
  StopToken stop = {};
  // Not owned; null is off.
  Trace* trace = nullptr;
  // For tests of the tests: what a correct engine never does.
  struct Faults {
    bool skip_wait_for_copy = false;
    bool skip_wait_for_compute = false;
  } faults = {};
};

struct ClientOptions {
  // Bring the next pass's first groups while this pass's last ones compute. Off for components that
  // run once (text encoders). Engine::announce() knows better.
  bool wrap_around = true;
  // Off brings each group of this component when it is leased.
  bool read_ahead = true;
  // Off keeps none of its groups in host memory, whatever room there is.
  bool host_homes = true;
  // The groups in the order in which a pass is expected to lease them; empty: each once, in order.
  std::vector<size_t> first_order = {};
  // The device that slots name while their group is away. Default: where compute happens.
  std::optional<at::Device> idle_device = {};
  // Told when a slot's weight no longer equals the checkpoint and where it is kept now. Called with
  // the engine locked.
  std::function<void(const at::Tensor& slot, const weights::StoredTensor& source)> source_changed =
      {};
};

struct Report {
  uint64_t bytes_read = 0;    // from disk
  uint64_t bytes_copied = 0;  // to an accelerator
  uint64_t leases = 0;
  uint64_t hits = 0;                 // the group was there, or on its way, when it was leased
  uint64_t misses = 0;               // it had to be asked for
  uint64_t dropped = 0;              // brought and not used
  uint64_t divergences = 0;          // passes whose order was not the expected one
  uint64_t changed = 0;              // groups that no longer equal their checkpoint
  uint64_t replans = 0;              // plans that measured times changed
  uint64_t shrinks = 0;              // budgets made smaller since the device had no more memory
  bool reads_packs = false;          // the active component streams from its lossless pack
  double stall_seconds = 0;          // the host waiting at a lease, in all
  double read_stall_seconds = 0;     // of it for reads
  double request_stall_seconds = 0;  // of it for groups that had to be asked for
  io::ReadTime reads;                // the disk, while there were reads to do
  uint64_t resident_bytes = 0;       // of the active component
  uint64_t arena_bytes = 0;
  uint64_t small_bytes = 0;      // of all components
  uint64_t peak_bytes = 0;       // the most of small + residents + what streams ever held
  uint64_t host_peak_bytes = 0;  // of pinned host memory
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

// A part of an engine's weights budget that is the application's. Move-only; must not outlive the
// engine. Its end gives the part back, from the next pass on.
class Reservation {
 public:
  Reservation() = default;
  Reservation(Reservation&& other) noexcept;
  Reservation& operator=(Reservation&& other) noexcept;
  ~Reservation() { release(); }
  void release() noexcept;
  uint64_t bytes() const { return bytes_; }

 private:
  friend class Engine;
  Reservation(Engine* engine, uint64_t bytes) : engine_(engine), bytes_(bytes) {}
  Engine* engine_ = nullptr;
  uint64_t bytes_ = 0;
};

// Shared by the components of one or more pipelines. What a component holds stays until another
// needs the room. Thread-safe: pipelines take turns, a pass at a time. Passed in, never global.
// Must outlive its clients.
class Engine {
 public:
  explicit Engine(EngineOptions options);
  ~Engine();

  const EngineOptions& options() const { return options_; }
  const io::ReadEngine& read_engine() const { return *reader_; }
  Report report() const;
  // Gives back all memory, except of groups with a lease out.
  void unload();
  void set_stop_token(StopToken stop);
  // From here on; null is off. The one before may end once this has returned.
  void set_trace(Trace* trace);

  // What comes next: passes of components, in order. While the last pass of one ends, the first
  // groups of the next are brought. Replaces what was announced before; a run that goes another way
  // is slower, never wrong.
  struct Announced {
    Client* client = nullptr;
    int64_t passes = 1;
  };
  void announce(std::vector<Announced> next);
  // A smaller weights budget from the next pass on. Throws BudgetError if a component cannot do
  // with it; then nothing changes.
  void set_weights_memory(uint64_t bytes);
  // Keeps `bytes` of the weights budget free of weights for as long as what is returned lives.
  // When this returns, weights hold no more than the rest; called within a pass of the same
  // thread, from its next pass on. Throws BudgetError with the numbers if a component cannot do
  // with the rest, ArgumentError for an engine without a budget.
  [[nodiscard]] Reservation reserve(uint64_t bytes);
  // After a pass failed with `error`: gives back all that weights hold on the device and plans with
  // less, so that the pass can be run again. `again`: it has been run again already. False where
  // an outer pass is still running. Throws DeviceError with the numbers where nothing helps.
  bool make_room(const c10::OutOfMemoryError& error, bool again);

 private:
  friend class Client;
  friend class Reservation;
  void activate_locked(Client& client);
  void prepare_memory_locked();
  // Allocates the arena, with a smaller budget if the device has no room for the one that is
  // planned. Throws DeviceError with the numbers.
  void allocate_arena_locked();
  // The arena for the plans as they are, and the largest that the budget allows.
  uint64_t wanted_arena_locked() const;
  uint64_t allowed_arena_locked() const;
  // All plans side by side, and whether the arena holds them so.
  uint64_t together_locked() const;
  bool holds_all_locked() const;
  // Pinned host memory, given what staging needs and what homes for all groups would take.
  uint64_t host_memory_locked(uint64_t staging, uint64_t all_homes) const;
  void drop_memory_locked();
  // What weights may take now; 0: as little as each component can do with.
  uint64_t budget_locked() const { return options_.weights_memory_bytes - reserved_; }
  // The least with which every component can be streamed.
  uint64_t least_budget_locked() const;
  // Between passes: what was reserved or given back since the last one.
  void apply_reservations_locked();
  bool pass_is_running_locked() const;
  bool is_leased_locked() const;
  void drop_everything_locked();
  // A smaller budget from here on, since the device has no more memory.
  void shrink_locked(uint64_t budget);
  // "9.1 KiB of small tensors, …": what weights hold, or would.
  std::string describe_plan_locked() const;
  // Makes room by dropping a component that does not run; false if there is none.
  bool evict_inactive_locked(const Client& requester);
  Client* announced_after_locked(const Client& client) const;
  void note_peak_locked();

  EngineOptions options_;
  Turn turn_;
  mutable std::mutex mutex_;
  std::unique_ptr<io::ReadEngine> reader_;
  Arena arena_;
  std::unique_ptr<Carrier> carrier_;  // with the arena's memory
  Client* active_ = nullptr;
  std::vector<Client*> clients_;  // least recently active first
  std::deque<Announced> announced_;
  Report report_;
  uint64_t held_small_ = 0;
  uint64_t reserved_ = 0;        // taken from the budget
  uint64_t asked_reserved_ = 0;  // of all reservations; in force from the next pass on
  bool somebody_waits_ = false;  // for staging, at a lease
};

// One component's groups on an engine. The first order is a guess; the order that a pass really had
// is recorded and replaces it.
// Ownership: keeps the slots' tensors; on destruction every slot is a stub again.
// Weights that are changed in place while leased, or replaced by set_data(), are kept: they are
// written to a file without a name, and brought from there from then on.
class Client {
 public:
  // Reads the small slots. Throws BudgetError if the groups cannot be streamed under the budget,
  // stating the least that would do; IoError.
  Client(Engine& engine, std::string name, std::vector<Group> groups,
         const ClientOptions& options = {});
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  // Returns when work on the calling thread's current stream may use the group's slots. Leases
  // nest, also of one group. Throws IoError (a failed read, a checkpoint that changed), Cancelled,
  // BudgetError (more is leased at once than the budget holds).
  Lease lease(size_t group);
  // Around one run of the component (a step); what is leased between them is the order.
  void begin_pass();
  void end_pass(bool completed = true);
  // Passes that run side by side and lease each group one after the other: between begin and end,
  // what the leader leases is kept until each of `followers` other passes has leased it too.
  void begin_lockstep(size_t followers);
  void follow(bool following);  // whether the next leases are a follower's
  void end_lockstep() noexcept;
  // Gives back all that is not leased.
  void unload();
  // Whether `slot` is one of the group's that come and go, and none of them was changed since their
  // sources were read.
  bool holds_source(size_t group, const at::Tensor& slot) const;

  const Plan& plan() const { return plan_; }
  const std::string& name() const { return name_; }
  Engine& engine() const { return engine_; }
  size_t group_count() const { return states_.size(); }

 private:
  friend class Engine;
  friend class Lease;
  struct State;
  struct Pending {  // a predicted use whose group is here or on its way
    size_t group;
    size_t position;        // in order_
    uint32_t skipped = 0;   // leases that came before it against the prediction
    bool follower = false;  // a later pass in lockstep
  };

  void release(size_t group) noexcept;
  void load_small_slots(std::vector<weights::BoundSlot> small);
  std::vector<GroupCost> costs_locked() const;
  uint64_t passing_bytes(const State& state) const;
  // The least that the groups need, beside small tensors.
  uint64_t smallest_locked(const std::vector<GroupCost>& costs) const;
  // The least budget with which it can be streamed, with the small tensors of all components.
  uint64_t least_budget_locked() const;
  // Throws BudgetError.
  PlanOptions plan_options_locked(const std::vector<GroupCost>& costs) const;
  Plan make_plan_locked() const;
  // What is expected of a plan, with the times that are known now.
  Prediction predict_locked(const Plan& plan) const;
  void adopt_plan_locked(Plan plan);
  // Plans if the room for it, or a group, has changed since it last did.
  void refresh_plan_locked();
  // After a pass: with its times, the groups that are read soon after one another for little
  // compute turn out to be the ones to keep.
  void measure_pass_locked();
  // Ends the account of the group that was leased last.
  void note_compute_locked(std::chrono::steady_clock::time_point until);
  bool is_leased_locked() const;
  void plan_by_time_locked();
  // Pack or checkpoint, whichever took less time; false where the other is to be tried first.
  bool choose_source_locked();
  // Whether the checkpoint itself may be faster than its pack: has to be tried to know.
  bool should_try_checkpoint_locked() const;
  // Changes the source of all groups; the next pass plans anew. REQUIRES: no lease is out.
  void read_from_locked(bool packs);
  void make_pieces_locked(State& state);
  at::Device idle_device() const { return options_.idle_device.value_or(engine_.options_.device); }
  void report_plan_locked();
  // Which pieces stay in host memory once they were read; returns the bytes they take. `residents`
  // too where another component may take their place.
  uint64_t assign_host_homes_locked(uint64_t budget, bool residents);
  void drop_all_locked() noexcept;
  // What has no lease out; false if there was nothing.
  bool drop_idle_locked() noexcept;
  bool wraps_locked() const;
  // Asks for the predicted groups in turn, as long as there is room.
  void read_ahead_locked();
  void read_ahead_quietly_locked() noexcept;
  // Before this component runs: its first groups.
  void bring_first_locked();
  // Reserves memory for what is missing of a group and begins to bring it; false if there is no
  // room.
  bool start_locked(State& state, Urgency urgency);
  void start_or_evict_locked(State& state, std::unique_lock<std::mutex>& lock);
  void arrive_locked(State& state, std::unique_lock<std::mutex>& lock);
  void drop_locked(State& state, bool forget_host = false) noexcept;
  void drop_if_unused_locked(State& state) noexcept;
  // Takes back the prediction that hurts least; false if there is none.
  bool evict_one_locked();
  // What it streams goes; what it holds for good stays until somebody needs the room.
  void forget_predictions_locked() noexcept;
  void adopt_order_locked(std::vector<size_t> order);
  // Weights that somebody gave to an idle slot.
  bool was_replaced_locked(const State& state) const;
  bool was_changed_locked(const State& state) const;
  // Writes the group's weights as they are now to a file of their own, which is their source from
  // then on. The group is absent afterwards.
  void save_changed_locked(State& state);
  // Where that failed: rather in memory of their own than lost. The group is absent afterwards.
  void hold_changed_locked(State& state) noexcept;

  Engine& engine_;
  std::string name_;
  ClientOptions options_;
  std::vector<std::unique_ptr<State>> states_;
  Plan plan_;
  uint64_t small_bytes_ = 0;
  // What passes showed, for planning again, by the source they read from.
  struct Measured {
    double pass_s = 0;              // 0: not measured
    std::vector<double> compute_s;  // one a group, with decoding where that is on its way
    io::ReadTime reads;
  };
  Measured measure_locked() const;  // of the pass that ends
  // Whether enough passes have shown that they are not what the plan was made for; fastest_
  // tells what they are.
  bool has_settled_locked(Measured pass);
  Measured measured_[2];  // checkpoint, pack
  Measured fastest_;      // of the last `counted_passes_`, with the reads of all of them
  int counted_passes_ = 0;
  int patience_ = 3;               // with passes that are not as planned
  bool brings_residents_ = false;  // the next pass, and so it takes longer than planned
  bool reads_packs_ = false;
  bool source_is_chosen_ = false;
  bool plans_by_time_ = false;  // with measured_[reads_packs_]
  std::chrono::steady_clock::time_point pass_began_, computing_since_;
  io::ReadTime read_before_;    // this pass
  State* computing_ = nullptr;  // since computing_since_: the group that was leased last

  std::vector<size_t> order_;
  bool order_is_guess_ = true;
  size_t cursor_ = 0;  // the next of order_ to be asked for
  std::deque<Pending> pending_;
  bool no_staging_ = false;   // why start_locked() last found no room
  State* filling_ = nullptr;  // the last of pending_, if a part of it found no room
  std::vector<size_t> recording_;
  int pass_depth_ = 0;
  bool plan_is_stale_ = true;  // also where a group that changed needs more room than it did
  bool has_homes_ = false;     // its groups have been given theirs in host memory
  uint64_t planned_room_ = 0;
  size_t followers_ = 0;
  bool following_ = false;
};

}  // namespace ferry::offload
