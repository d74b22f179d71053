#include <c10/util/ScopeExit.h>

#include <algorithm>
#include <utility>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/base/trace.h"
#include "ferry/base/units.h"
#include "ferry/offload/carrier.h"
#include "ferry/offload/client_state.h"
#include "ferry/offload/engine.h"

namespace ferry::offload {

using Clock = std::chrono::steady_clock;

// ---- from registration to activation ----

Client::Client(Engine& engine, std::string name, std::vector<Group> groups,
               const ClientOptions& options)
    : engine_(engine), name_(std::move(name)), options_(options) {
  std::vector<weights::BoundSlot> small;
  for (Group& group : groups) {
    auto is_small = [&](const weights::BoundSlot& bound) {
      const uint64_t bytes = bound.slot.size_bytes();
      return bytes == 0 || bytes < engine_.options_.small_slot_bytes;
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

bool Client::is_leased_locked() const {
  return std::any_of(states_.begin(), states_.end(),
                     [](const auto& state) { return state->leases > 0; });
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
    if (cursor_ == order_.size() && pending_.empty()) cursor_ = 0;  // the last pass did not wrap
    pass_began_ = computing_since_ = Clock::now();
    computing_ = nullptr;
    for (auto& state : states_) {
      state->used_in_pass = false;
      state->compute_s = 0;
    }
    try {
      // Laid out anew also where a component that came meanwhile holds small slots.
      if (plan_is_stale_ || engine_.arena_.size_bytes() > engine_.allowed_arena_locked())
        engine_.active_ = nullptr;
      engine_.activate_locked(*this);
      read_before_ = engine_.reader_->read_time();
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
    if (!start_locked(*filling_, Urgency::ahead)) return;
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
      const bool whole = start_locked(state, Urgency::ahead);
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
      if (!start_locked(*filling_, Urgency::ahead)) return;
      filling_ = nullptr;
      continue;
    }
    State& state = *states_[order_[cursor_]];
    const bool whole = start_locked(state, Urgency::ahead);
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

bool Client::start_locked(State& state, Urgency urgency) {
  // What stays for the whole pass goes to the arena's end, not into a hole between others that go.
  if (state.group.keep_resident && state.is_absent() && !engine_.holds_all_locked()) {
    while (engine_.evict_inactive_locked(*this)) {
    }
  }
  for (; state.started < state.pieces.size(); ++state.started) {
    Piece& piece = state.pieces[state.started];
    Start outcome = Start::begun;
    while ((outcome = engine_.carrier_->start(piece, urgency)) != Start::begun) {
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
  while (!start_locked(state, Urgency::now)) {
    if (no_staging_) {
      engine_.somebody_waits_ = true;
      const auto waited = c10::make_scope_exit([&] { engine_.somebody_waits_ = false; });
      if (engine_.carrier_->wait_for_staging(lock)) continue;
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
    Fence fence = std::exchange(state.last_use, nullptr);
    if (!fence && !state.is_absent()) fence = engine_.carrier_->fence();
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
      // Its last use may have been on another stream: who waits for this one waits for both.
      engine_.carrier_->follow(std::exchange(state.last_use, nullptr));
      engine_.carrier_->poll();
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
        log::error(
            "{}: the changed weights of {} could not be saved ({}); they stay in memory, outside "
            "of "
            "the budget, and are saved when they are used next",
            name_, state.group.name, error.what());
        hold_changed_locked(state);
      }
      if (state.placement == Placement::streamed && state.attached && state.predicted == 0)
        drop_if_unused_locked(state);
      else if (state.placement == Placement::streamed && state.attached) {
        for (Piece& piece : state.pieces) piece.detach();
        state.attached = false;
      }
      // Whoever drops it later may be on another stream than its work.
      if (engine_.carrier_ && !state.is_absent()) state.last_use = engine_.carrier_->fence();
      if (engine_.active_ == this) read_ahead_quietly_locked();
    }
  }
  engine_.turn_.leave();
}

}  // namespace ferry::offload
