#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/base/trace.h"
#include "ferry/base/units.h"
#include "ferry/offload/carrier.h"
#include "ferry/offload/client_state.h"
#include "ferry/offload/engine.h"
#include "ferry/weights/private_file.h"
#include "ferry/weights/stub.h"

namespace ferry::offload {

using Clock = std::chrono::steady_clock;

// ---- from registration to activation ----

Client::Client(Engine& engine, std::string name, std::vector<Group> groups,
               const ClientOptions& options)
    : engine_(engine), name_(std::move(name)), options_(options) {
  std::vector<weights::BoundSlot> small;
  for (Group& group : groups) {
    auto is_small = [&](const weights::BoundSlot& bound) {
      return bound.slot.size_bytes() < engine_.options_.small_slot_bytes;
    };
    for (const weights::BoundSlot& bound : group.slots) {
      if (is_small(bound)) small.push_back(bound);
    }
    std::erase_if(group.slots, is_small);
    // A group of small slots only keeps its number: leasing it is a matter of nothing.
    auto state = std::make_unique<State>();
    for (const weights::BoundSlot& bound : group.slots)
      state->size_bytes += bound.slot.size_bytes();
    for (const weights::BoundSlot& bound : group.slots) reads_packs_ |= bound.packed.has_value();
    state->group = std::move(group);
    states_.push_back(std::move(state));
  }
  for (auto& state : states_) make_pieces_locked(*state);
  load_small_slots(std::move(small));
  order_ = options_.first_order;
  if (order_.empty()) {
    for (size_t i = 0; i < states_.size(); ++i) order_.push_back(i);
  }

  std::lock_guard lock(engine_.mutex_);
  engine_.held_small_ += small_bytes_;
  try {
    try {
      refresh_plan_locked();
    } catch (const BudgetError&) {
      if (!reads_packs_) throw;
      // What is decoded takes room twice while it arrives.
      read_from_locked(/*packs=*/false);
      refresh_plan_locked();
    }
    // Its small slots take from what the others planned with: better told now than at first use.
    for (Client* other : engine_.clients_) other->make_plan_locked();
  } catch (...) {
    engine_.held_small_ -= small_bytes_;
    throw;
  }
  engine_.clients_.insert(engine_.clients_.begin(), this);
  for (auto& state : states_) {
    for (Piece& piece : state->pieces) piece.detach();
  }
}

Client::~Client() {
  std::lock_guard lock(engine_.mutex_);
  drop_all_locked();
  if (engine_.active_ == this) engine_.active_ = nullptr;
  engine_.held_small_ -= small_bytes_;
  std::erase(engine_.clients_, this);
  std::erase_if(engine_.announced_,
                [this](const Engine::Announced& one) { return one.client == this; });
}

void Client::load_small_slots(std::vector<weights::BoundSlot> small) {
  for (const weights::BoundSlot& bound : small) {
    small_bytes_ += bound.slot.size_bytes();
    at::Tensor tensor = bound.slot.tensor;
    tensor.set_data(weights::read_tensor(bound).to(engine_.options_.device));
  }
}

std::vector<GroupCost> Client::costs_locked() const {
  const bool on_accelerator = !engine_.options_.device.is_cpu();
  const Measured& measured = measured_[reads_packs_];
  std::vector<GroupCost> costs;
  for (const auto& state : states_) {
    GroupCost cost;
    cost.name = state->group.name;
    cost.keep_resident = state->group.keep_resident;
    for (const Piece& piece : state->pieces) {
      cost.size_bytes += piece.footprint(on_accelerator);
      cost.arena_bytes += piece.arriving_footprint(on_accelerator);
    }
    if (plans_by_time_) {
      cost.disk_bytes = 0;
      for (const Piece& piece : state->pieces) cost.disk_bytes += piece.read_bytes;
      cost.compute_s = measured.compute_s[costs.size()];
    }
    costs.push_back(std::move(cost));
  }
  return costs;
}

uint64_t Client::least_budget_locked() const {
  return engine_.held_small_ + smallest_budget(costs_locked());
}

Plan Client::make_plan_locked() const {
  const bool on_accelerator = !engine_.options_.device.is_cpu();
  const std::vector<GroupCost> costs = costs_locked();
  const uint64_t least = engine_.held_small_ + smallest_budget(costs);
  uint64_t budget = engine_.budget_locked();
  if (budget == 0) {
    uint64_t largest = 0;
    for (const GroupCost& cost : costs) {
      if (!cost.keep_resident) largest = std::max(largest, cost.arena_bytes);
    }
    budget = Arena::round_up(least) + (options_.read_ahead ? largest : 0);
  }
  if (budget < least) {
    throw_error<BudgetError>(
        "{}: a weights budget of {} is too small: {} of small tensors stay in memory, and the "
        "largest group needs {}; give at least {}",
        name_, format_bytes(budget), format_bytes(engine_.held_small_),
        format_bytes(smallest_budget(costs)), format_bytes_up(least));
  }
  PlanOptions options{.budget_bytes =
                          (budget - engine_.held_small_) / Arena::kAlignment * Arena::kAlignment};
  if (engine_.options_.preferred_arena_bytes > 0)
    options.preferred_arena_bytes = engine_.options_.preferred_arena_bytes;
  if (plans_by_time_) {
    options.rates.disk_bytes_per_s = measured_[reads_packs_].disk_bytes_per_s;
    // The arena is not made anew for it, unless what changed does not fit there.
    if (engine_.carrier_ && engine_.arena_.size_bytes() >= smallest_budget(costs))
      options.budget_bytes = std::min(options.budget_bytes, engine_.arena_.size_bytes());
    options.order = order_;
    options.wrap_around = options_.wrap_around;
  }
  Plan plan = make_plan(costs, options);
  // Residents that are converted pass through the ring on their way.
  uint64_t passing = 0;
  for (size_t i = 0; i < states_.size(); ++i) {
    if (plan.placements[i] != Placement::resident) continue;
    for (const Piece& piece : states_[i]->pieces)
      if (!on_accelerator && piece.all_converted)
        passing = std::max(passing, Arena::round_up(piece.read_bytes));
  }
  if (passing > plan.arena_bytes) {
    const uint64_t least_streamed = smallest_budget(costs);
    if (options.budget_bytes >= passing + least_streamed) {
      options.budget_bytes -= passing;
      plan = make_plan(costs, options);
      plan.arena_bytes = std::max(plan.arena_bytes, passing);
    } else {
      // Too tight for both: all of it is the ring.
      plan.streamed_bytes = 0;
      plan.resident_bytes = 0;
      for (size_t i = 0; i < costs.size(); ++i) {
        const bool keep = costs[i].keep_resident;
        plan.placements[i] = keep ? Placement::resident : Placement::streamed;
        (keep ? plan.resident_bytes : plan.streamed_bytes) += costs[i].size_bytes;
      }
      plan.arena_bytes = options.budget_bytes - plan.resident_bytes;
    }
  }
  return plan;
}

void Client::refresh_plan_locked() {
  const uint64_t room = engine_.budget_locked() - engine_.held_small_;
  if (!plan_is_stale_ && planned_room_ == room) return;
  adopt_plan_locked(make_plan_locked());
  planned_room_ = room;
  plan_is_stale_ = false;
}

void Client::adopt_plan_locked(Plan plan) {
  plan_ = std::move(plan);
  for (size_t i = 0; i < states_.size(); ++i) {
    State& state = *states_[i];
    state.placement = plan_.placements[i];
    for (Piece& piece : state.pieces) {
      // A piece that is here keeps its place.
      if (piece.where == Whereabouts::absent)
        piece.resident = state.placement == Placement::resident;
    }
  }
}

void Client::note_compute_locked(Clock::time_point until) {
  if (computing_)
    computing_->compute_s += std::chrono::duration<double>(until - computing_since_).count();
  computing_ = nullptr;
}

void Client::measure_pass_locked() {
  // The first pass pays for pages that are touched for the first time.
  constexpr int kMeasured = 2;
  // Passes in lockstep end as one: each group's compute is that of all of them.
  if (!engine_.options_.replan || order_is_guess_ || plan_.streamed_bytes == 0 ||
      ++measured_passes_ != kMeasured)
    return;
  Measured& measured = measured_[reads_packs_];
  measured.pass_s = std::chrono::duration<double>(Clock::now() - pass_began_).count();
  measured.disk_bytes_per_s = engine_.carrier_->read_rate();
  measured.compute_s.clear();
  for (const auto& state : states_) {
    measured.compute_s.push_back(state->compute_s);
    if (state->placement == Placement::resident) continue;
    for (const Piece& piece : state->pieces) measured.compute_s.back() += piece.convert_s;
  }
  const bool leased = std::any_of(states_.begin(), states_.end(),
                                  [](const auto& state) { return state->leases > 0; });
  if (leased) return;
  if (should_try_checkpoint_locked()) {
    read_from_locked(/*packs=*/false);
    measured_passes_ = 0;
    return;
  }
  const Measured& other = measured_[!reads_packs_];
  if (other.pass_s > 0 && other.pass_s < measured.pass_s) read_from_locked(!reads_packs_);
  if (other.pass_s > 0) {
    log::debug("{}: a step takes {} from the pack, {} from the checkpoint", name_,
               format_duration(measured_[true].pass_s), format_duration(measured_[false].pass_s));
  }
  // On an accelerator a lease's time is the host's, not the device's.
  if (!engine_.options_.device.is_cpu()) return;
  const Measured& chosen = measured_[reads_packs_];
  if (chosen.disk_bytes_per_s > 0) {
    plan_by_time_locked();
  } else {  // nobody had to wait: the plan serves
    Prediction& prediction = plan_.prediction;
    prediction.compute_s = std::reduce(chosen.compute_s.begin(), chosen.compute_s.end());
    prediction.step_s = prediction.compute_s;
    prediction.bound = Bound::compute;
  }
}

bool Client::should_try_checkpoint_locked() const {
  // On an accelerator decoding is beside the compute, and the disk is slower than both.
  if (!reads_packs_ || !engine_.options_.device.is_cpu() || measured_[false].pass_s > 0)
    return false;
  const Measured& measured = measured_[true];
  if (measured.disk_bytes_per_s <= 0) return true;
  // With a disk that had to be waited for, reading more takes as long as it takes.
  double checkpoint_bytes = 0;
  for (const auto& state : states_) {
    if (state->placement == Placement::streamed)
      checkpoint_bytes += static_cast<double>(state->size_bytes);
  }
  return checkpoint_bytes / measured.disk_bytes_per_s < measured.pass_s;
}

void Client::read_from_locked(bool packs) {
  drop_all_locked();
  reads_packs_ = packs;
  for (auto& state : states_) make_pieces_locked(*state);
  plan_is_stale_ = true;
}

void Client::make_pieces_locked(State& state) {
  state.pieces = make_pieces(state.group.name, state.group.slots, engine_.options_.device,
                             engine_.options_.piece_bytes, reads_packs_);
  for (Piece& piece : state.pieces) piece.resident = state.placement == Placement::resident;
}

void Client::plan_by_time_locked() {
  plans_by_time_ = true;
  try {
    Plan plan = make_plan_locked();
    if (plan.peak_bytes() > engine_.arena_.size_bytes() || plan.placements == plan_.placements)
      return;
    // From an empty arena: what stays is laid out anew.
    drop_all_locked();
    adopt_plan_locked(std::move(plan));
    plan_is_stale_ = false;
    report_plan_locked();
    ++engine_.report_.replans;
    log::debug("{}: planned again with measured times: {} resident, a step of {} bound by {}",
               name_, format_bytes(plan_.resident_bytes), format_duration(plan_.prediction.step_s),
               bound_name(plan_.prediction.bound));
  } catch (const std::exception& error) {
    log::debug("{}: planning again failed: {}", name_, error.what());
    plans_by_time_ = false;
  }
}

void Client::report_plan_locked() {
  engine_.arena_.set_ring_bytes(plan_.arena_bytes);
  engine_.report_.arena_bytes = plan_.arena_bytes;
  engine_.report_.resident_bytes = plan_.resident_bytes;
  engine_.report_.reads_packs = reads_packs_;
}

uint64_t Client::assign_host_homes_locked(uint64_t budget, bool residents) {
  auto comes_back = [&](const State& state) {
    return residents || state.placement == Placement::streamed;
  };
  auto bytes_of = [](const Piece& piece) {
    return (piece.all_converted ? 0 : Arena::round_up(piece.read_bytes)) +
           Arena::round_up(piece.convert_bytes);
  };
  uint64_t wanted = 0;
  for (const auto& state : states_) {
    if (!comes_back(*state)) continue;
    for (const Piece& piece : state->pieces) wanted += piece.staged ? 0 : bytes_of(piece);
  }
  // Spread evenly, so that the disk has the whole step for the rest.
  const double share = std::min(
      1.0, static_cast<double>(budget) / static_cast<double>(std::max<uint64_t>(wanted, 1)));
  double account = 0;
  uint64_t taken = 0;
  auto assign = [&](bool fill) {
    for (auto& state : states_) {
      for (Piece& piece : state->pieces) {
        if (piece.staged) continue;
        if (!fill) piece.host_home = false;
        if (piece.host_home || !comes_back(*state)) continue;
        const uint64_t bytes = bytes_of(piece);
        account += share * static_cast<double>(bytes);
        if (taken + bytes > budget || (!fill && account < 0.5 * static_cast<double>(bytes)))
          continue;
        piece.host_home = true;
        account -= static_cast<double>(bytes);
        taken += bytes;
      }
    }
  };
  assign(/*fill=*/false);
  assign(/*fill=*/true);
  return taken;
}

void Client::drop_all_locked() noexcept {
  forget_predictions_locked();
  for (auto& state : states_) {
    if (state->leases == 0) drop_locked(*state, /*forget_host=*/true);
  }
}

bool Client::drop_idle_locked() noexcept {
  forget_predictions_locked();
  bool any = false;
  for (auto& state : states_) {
    if (state->leases > 0 || state->is_absent() || state->pieces.empty()) continue;
    drop_locked(*state);  // what has a home in host memory comes back from there
    any = true;
  }
  return any;
}

void Client::unload() {
  std::lock_guard lock(engine_.mutex_);
  drop_all_locked();
  if (engine_.active_ == this) engine_.active_ = nullptr;
}

// ---- passes and the order ----

void Client::begin_pass() {
  engine_.turn_.enter();
  try {
    std::lock_guard lock(engine_.mutex_);
    engine_.apply_reservations_locked();
    if (pass_depth_++ > 0) return;
    recording_.clear();
    pass_began_ = computing_since_ = Clock::now();
    computing_ = nullptr;
    for (auto& state : states_) {
      state->used_in_pass = false;
      state->compute_s = 0;
    }
    try {
      if (plan_is_stale_) engine_.active_ = nullptr;
      engine_.activate_locked(*this);
      read_ahead_quietly_locked();
    } catch (...) {
      --pass_depth_;
      throw;
    }
  } catch (...) {
    engine_.turn_.leave();
    throw;
  }
}

void Client::end_pass(bool completed) {
  {
    std::lock_guard lock(engine_.mutex_);
    if (--pass_depth_ == 0) {
      if (completed) {
        if (recording_ != order_) {
          if (!order_is_guess_) ++engine_.report_.divergences;
          log::debug("{}: the order of {} groups differs from the {}", name_, recording_.size(),
                     order_is_guess_ ? "registration order" : "last pass");
          adopt_order_locked(std::move(recording_));
        }
        note_compute_locked(Clock::now());
        measure_pass_locked();
        order_is_guess_ = false;
        for (auto& state : states_) state->used_in_pass = false;
        std::deque<Engine::Announced>& announced = engine_.announced_;
        if (!announced.empty() && announced.front().client == this &&
            --announced.front().passes == 0)
          announced.pop_front();
        if (engine_.active_ == this) read_ahead_quietly_locked();
      } else {
        forget_predictions_locked();
        engine_.announced_.clear();
      }
      recording_.clear();
    }
  }
  engine_.turn_.leave();
}

void Client::begin_lockstep(size_t followers) {
  std::lock_guard lock(engine_.mutex_);
  followers_ = followers;
  following_ = false;
}

void Client::follow(bool following) {
  std::lock_guard lock(engine_.mutex_);
  following_ = following;
}

void Client::end_lockstep() noexcept {
  std::lock_guard lock(engine_.mutex_);
  followers_ = 0;
  following_ = false;
  std::erase_if(pending_, [&](const Pending& use) {
    if (!use.follower) return false;
    State& state = *states_[use.group];
    --state.predicted;
    drop_if_unused_locked(state);
    return true;
  });
}

void Client::adopt_order_locked(std::vector<size_t> order) {
  order_ = std::move(order);
  for (Pending& use : pending_) --states_[use.group]->predicted;
  pending_.clear();
  filling_ = nullptr;
  // Keep what is here already and comes first in the new order.
  cursor_ = 0;
  while (wraps_locked() && cursor_ < order_.size()) {
    State& state = *states_[order_[cursor_]];
    if (!state.is_complete()) break;
    ++state.predicted;
    pending_.push_back({order_[cursor_], cursor_});
    ++cursor_;
  }
  for (auto& state : states_) drop_if_unused_locked(*state);
}

void Client::forget_predictions_locked() noexcept {
  for (Pending& use : pending_) states_[use.group]->predicted = 0;
  pending_.clear();
  filling_ = nullptr;
  cursor_ = 0;
  for (auto& state : states_) drop_if_unused_locked(*state);
}

// Whether the pass after the one that runs (or ran last) is this component's again.
bool Client::wraps_locked() const {
  const auto& announced = engine_.announced_;
  if (announced.empty()) return options_.wrap_around;
  if (announced.front().client != this) return false;
  return announced.front().passes > (pass_depth_ > 0 ? 1 : 0);
}

void Client::read_ahead_locked() {
  engine_.carrier_->poll();
  if (engine_.somebody_waits_) return;  // room goes to the lease that is being waited for
  if (!engine_.options_.read_ahead || !options_.read_ahead || (pass_depth_ == 0 && order_is_guess_))
    return;
  if (filling_) {
    if (!start_locked(*filling_)) return;
    filling_ = nullptr;
  }
  // At most one cycle ahead. `budget` ends the loop where every group of a guessed order was used.
  for (size_t budget = order_.size(); budget > 0 && pending_.size() < order_.size(); --budget) {
    if (cursor_ == order_.size()) {
      if (!wraps_locked()) {
        if (Client* next = engine_.announced_after_locked(*this)) next->bring_first_locked();
        return;
      }
      if (order_is_guess_) return;
      cursor_ = 0;
    }
    if (pass_depth_ == 0 && !wraps_locked()) return;
    const size_t group = order_[cursor_];
    State& state = *states_[group];
    if (!(order_is_guess_ && state.used_in_pass)) {
      const bool whole = start_locked(state);
      if (!whole && state.is_absent()) return;
      ++state.predicted;
      pending_.push_back({group, cursor_});
      if (!whole) {
        ++cursor_;
        filling_ = &state;
        return;
      }
    }
    ++cursor_;
  }
}

void Client::read_ahead_quietly_locked() noexcept {
  try {
    read_ahead_locked();
  } catch (const std::exception& error) {
    // The group that could not be asked for is absent: its own lease will meet the error.
    log::debug("{}: reading ahead failed: {}", name_, error.what());
  }
}

void Client::bring_first_locked() {
  while (cursor_ < order_.size() && pending_.size() < order_.size()) {
    if (filling_) {
      if (!start_locked(*filling_)) return;
      filling_ = nullptr;
      continue;
    }
    State& state = *states_[order_[cursor_]];
    const bool whole = start_locked(state);
    if (!whole && state.is_absent()) return;
    ++state.predicted;
    pending_.push_back({order_[cursor_], cursor_});
    ++cursor_;
    if (!whole) filling_ = &state;
  }
}

bool Client::evict_one_locked() {
  if (pending_.empty()) return engine_.evict_inactive_locked(*this);
  // A group that was passed over for long will hardly be used in this pass; else the one that is
  // needed last.
  constexpr uint32_t kStale = 32;
  auto victim = std::find_if(pending_.begin(), pending_.end(),
                             [](const Pending& use) { return use.skipped >= kStale; });
  if (victim == pending_.end()) {
    victim = std::prev(pending_.end());
    if (!victim->follower) cursor_ = victim->position;
  }
  State& state = *states_[victim->group];
  pending_.erase(victim);
  --state.predicted;
  if (filling_ == &state) filling_ = nullptr;
  if (state.placement == Placement::streamed) ++engine_.report_.dropped;
  drop_if_unused_locked(state);
  return true;
}

// ---- one group ----

bool Client::start_locked(State& state) {
  for (; state.started < state.pieces.size(); ++state.started) {
    Piece& piece = state.pieces[state.started];
    Start outcome = Start::begun;
    while ((outcome = engine_.carrier_->start(piece)) != Start::begun) {
      no_staging_ = outcome == Start::no_staging;
      const bool own_limit =
          !piece.resident && !engine_.arena_.ring_has_room(
                                 piece.arriving_footprint(!engine_.options_.device.is_cpu()));
      if (no_staging_ || own_limit || !engine_.evict_inactive_locked(*this)) {
        engine_.note_peak_locked();
        return false;
      }
    }
  }
  engine_.note_peak_locked();
  return true;
}

void Client::start_or_evict_locked(State& state, std::unique_lock<std::mutex>& lock) {
  bool restarted = false;
  while (!start_locked(state)) {
    if (no_staging_) {
      engine_.somebody_waits_ = true;
      const bool freed = engine_.carrier_->wait_for_staging(lock);
      engine_.somebody_waits_ = false;
      if (freed) continue;
    }
    if (evict_one_locked()) continue;
    if (!restarted) {
      // What is idle, or the group's own first pieces, may split the holes.
      restarted = true;
      drop_idle_locked();
      drop_locked(state);
      continue;
    }
    std::string leased;
    for (const auto& other : states_) {
      if (other->leases > 0 && other.get() != &state)
        leased += fmt::format("{}{} ({})", leased.empty() ? "" : ", ", other->group.name,
                              format_bytes(other->size_bytes));
    }
    drop_locked(state);
    throw_error<BudgetError>(
        "{}: no room for {} ({}) in an arena of {} while these are in use: {}; give more memory",
        name_, state.group.name, format_bytes(state.size_bytes),
        format_bytes(engine_.arena_.size_bytes()), leased.empty() ? "none" : leased);
  }
}

void Client::arrive_locked(State& state, std::unique_lock<std::mutex>& lock) {
  try {
    for (Piece& piece : state.pieces) engine_.carrier_->arrive(piece, lock);
  } catch (...) {
    drop_locked(state);
    throw;
  }
  if (state.attached) return;
  state.versions.clear();
  for (Piece& piece : state.pieces) {
    piece.attach();
    for (const SlotPlace& slot : piece.slots)
      state.versions.push_back(weights::version_of(slot.tensor));
  }
  state.attached = true;
}

void Client::drop_locked(State& state, bool forget_host) noexcept {
  if (state.attached) {
    for (Piece& piece : state.pieces) piece.detach();
    state.attached = false;
  }
  if (engine_.carrier_ && !state.pieces.empty()) {
    const Fence fence = state.is_absent() ? nullptr : engine_.carrier_->fence();
    for (Piece& piece : state.pieces) {
      const bool was_here = piece.where == Whereabouts::here;
      if (piece.where != Whereabouts::absent || (forget_host && piece.staged))
        engine_.carrier_->drop(piece, was_here ? fence : nullptr, forget_host);
      piece.resident = state.placement == Placement::resident;
    }
  }
  state.started = 0;
  if (filling_ == &state) filling_ = nullptr;
}

void Client::drop_if_unused_locked(State& state) noexcept {
  if (state.leases == 0 && state.predicted == 0 && state.placement == Placement::streamed &&
      !state.is_absent()) {
    drop_locked(state);
  }
}

// ---- weights that change ----

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
        weights::make_stub(bound.slot.shape(), values[i].scalar_type(), engine_.options_.device));
    if (options_.source_changed) options_.source_changed(bound.slot.tensor, bound.source);
  }
  auto footprint = [&] {
    uint64_t bytes = 0;
    for (const Piece& piece : state.pieces)
      bytes += piece.arriving_footprint(!engine_.options_.device.is_cpu());
    return bytes;
  };
  const uint64_t before = footprint();
  make_pieces_locked(state);
  if (footprint() > before) plan_is_stale_ = true;
  ++engine_.report_.changed;
}

// ---- leases ----

Lease Client::lease(size_t group) {
  engine_.turn_.enter();
  try {
    std::unique_lock lock(engine_.mutex_);
    engine_.options_.stop.throw_if_stopped();
    engine_.activate_locked(*this);
    State& state = *states_.at(group);
    if (state.leases > 0) {
      ++state.leases;
      return Lease(this, group);
    }
    if (was_replaced_locked(state)) save_changed_locked(state);

    auto use = std::find_if(pending_.begin(), pending_.end(),
                            [&](const Pending& entry) { return entry.group == group; });
    const bool predicted = use != pending_.end();
    if (predicted) {
      for (auto before = pending_.begin(); before != use; ++before) ++before->skipped;
      pending_.erase(use);
      --state.predicted;
    }
    Report& report = engine_.report_;
    ++report.leases;
    state.leases = 1;  // holds it against eviction
    const auto began = Clock::now();
    note_compute_locked(began);
    bool waited = false;
    const bool asked_for = state.is_absent() && !state.pieces.empty();
    try {
      if (asked_for) {
        ++report.misses;
        if (!predicted && cursor_ < order_.size() && order_[cursor_] == group) ++cursor_;
      } else {
        ++report.hits;
      }
      if (!state.is_complete()) start_or_evict_locked(state, lock);
      if (filling_ == &state) filling_ = nullptr;
      waited = std::any_of(state.pieces.begin(), state.pieces.end(), [&](const Piece& piece) {
        return !engine_.carrier_->has_arrived(piece);
      });
      // While this one arrives, the ones behind it can be asked for.
      if (waited) read_ahead_quietly_locked();
      arrive_locked(state, lock);
    } catch (...) {
      state.leases = 0;
      throw;
    }
    const auto ended = Clock::now();
    const double stall = std::chrono::duration<double>(ended - began).count();
    report.stall_seconds += stall;
    if (waited) (asked_for ? report.request_stall_seconds : report.read_stall_seconds) += stall;
    if (Trace* trace = engine_.options_.trace; trace && waited)
      trace->complete("wait", state.group.name, began, ended, "waits");
    state.used_in_pass = true;
    state.leased_at = computing_since_ = ended;
    computing_ = &state;
    if (followers_ > 0 && !following_) {
      state.predicted += static_cast<int>(followers_);
      for (size_t i = 0; i < followers_; ++i) pending_.push_front({group, 0, 0, true});
    }
    if (pass_depth_ > 0 && !following_) recording_.push_back(group);
    engine_.carrier_->poll();
    return Lease(this, group);
  } catch (...) {
    engine_.turn_.leave();
    throw;
  }
}

void Client::release(size_t group) noexcept {
  {
    std::lock_guard lock(engine_.mutex_);
    State& state = *states_[group];
    if (--state.leases == 0) {
      if (Trace* trace = engine_.options_.trace) {
        trace->complete("compute", state.group.name, state.leased_at, Clock::now(), "compute");
      }
      try {
        if (!state.pieces.empty() && was_changed_locked(state)) save_changed_locked(state);
      } catch (const std::exception& error) {
        // Rather in memory for good than lost.
        log::error("{}: the changed weights of {} could not be saved ({}); they stay in memory",
                   name_, state.group.name, error.what());
        ++state.predicted;
      }
      if (state.placement == Placement::streamed && state.attached && state.predicted == 0)
        drop_if_unused_locked(state);
      else if (state.placement == Placement::streamed && state.attached) {
        for (Piece& piece : state.pieces) piece.detach();
        state.attached = false;
      }
      if (engine_.active_ == this) read_ahead_quietly_locked();
    }
  }
  engine_.turn_.leave();
}

}  // namespace ferry::offload
