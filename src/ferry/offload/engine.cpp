#include "ferry/offload/engine.h"

#include <algorithm>
#include <set>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/base/trace.h"
#include "ferry/base/units.h"
#include "ferry/offload/group_state.h"

namespace ferry::offload {

using Clock = std::chrono::steady_clock;

// ---- Lease ----

Lease::Lease(Lease&& other) noexcept
    : client_(std::exchange(other.client_, nullptr)), group_(other.group_) {}

Lease& Lease::operator=(Lease&& other) noexcept {
  if (this != &other) {
    release();
    client_ = std::exchange(other.client_, nullptr);
    group_ = other.group_;
  }
  return *this;
}

void Lease::release() noexcept {
  if (client_) std::exchange(client_, nullptr)->release(group_);
}

// ---- Engine ----

namespace {

// A request is one kernel operation: to keep the whole arena in flight, the queue has to be as deep
// as the budget has requests.
io::ReadEngineOptions with_depth(io::ReadEngineOptions read, uint64_t budget) {
  read.queue_depth = std::clamp<unsigned>(
      static_cast<unsigned>(std::min<uint64_t>(budget / read.request_bytes, 1024)),
      read.queue_depth, 1024);
  return read;
}

}  // namespace

Engine::Engine(EngineOptions options)
    : options_(std::move(options)),
      reader_(io::make_read_engine(with_depth(options_.read, options_.weights_memory_bytes))) {}

Engine::~Engine() = default;

Report Engine::report() const {
  std::lock_guard lock(mutex_);
  Report report = report_;
  report.bytes_read = reader_->bytes_read();
  report.small_bytes = held_small_;
  return report;
}

void Engine::unload() {
  std::lock_guard lock(mutex_);
  for (Client* client : clients_) client->deactivate_locked();
  active_ = nullptr;
}

void Engine::set_stop_token(StopToken stop) {
  std::lock_guard lock(mutex_);
  options_.stop = std::move(stop);
}

void Engine::activate_locked(Client& client) {
  if (active_ == &client) return;
  if (active_) active_->deactivate_locked();
  active_ = nullptr;
  client.activate_locked();
  active_ = &client;
}

// ---- Client: from registration to activation ----

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
    states_.push_back(std::make_unique<State>(group));
  }
  for (const weights::BoundSlot& bound : small) {
    small_bytes_ += bound.slot.size_bytes();
    at::Tensor tensor = bound.slot.tensor;
    tensor.set_data(weights::read_tensor(bound));
  }
  order_ = options_.first_order;
  if (order_.empty()) {
    for (size_t i = 0; i < states_.size(); ++i) order_.push_back(i);
  }

  std::lock_guard lock(engine_.mutex_);
  engine_.held_small_ += small_bytes_;
  try {
    plan_locked();
  } catch (...) {
    engine_.held_small_ -= small_bytes_;
    throw;
  }
  engine_.clients_.push_back(this);
}

Client::~Client() {
  std::lock_guard lock(engine_.mutex_);
  deactivate_locked();
  if (engine_.active_ == this) engine_.active_ = nullptr;
  engine_.held_small_ -= small_bytes_;
  std::erase(engine_.clients_, this);
}

void Client::plan_locked() {
  const uint64_t budget = engine_.options_.weights_memory_bytes;
  std::vector<GroupCost> costs;
  for (const auto& state : states_)
    costs.push_back({state->name, state->size_bytes, state->arena_bytes(), state->keep_resident});
  const uint64_t least = engine_.held_small_ + smallest_budget(costs);
  if (budget < least) {
    throw_error<BudgetError>(
        "{}: a weights budget of {} is too small: {} of small tensors stay in memory, and the "
        "largest group needs {}; "
        "give at least {}",
        name_, format_bytes(budget), format_bytes(engine_.held_small_),
        format_bytes(smallest_budget(costs)), format_bytes(least));
  }
  PlanOptions options{.budget_bytes = budget - engine_.held_small_};
  if (engine_.options_.preferred_arena_bytes > 0)
    options.preferred_arena_bytes = engine_.options_.preferred_arena_bytes;
  plan_ = make_plan(costs, options);
  for (size_t i = 0; i < states_.size(); ++i) states_[i]->placement = plan_.placements[i];
}

void Client::activate_locked() {
  plan_locked();  // other components may have registered since
  if (plan_.arena_bytes > 0) arena_ = Arena(plan_.arena_bytes);
  engine_.report_.arena_bytes = plan_.arena_bytes;
  engine_.report_.resident_bytes = plan_.resident_bytes;
  engine_.report_.peak_bytes = std::max(
      engine_.report_.peak_bytes, engine_.held_small_ + plan_.arena_bytes + plan_.resident_bytes);
  log::debug("{}: {} resident, {} streamed a pass through an arena of {}", name_,
             format_bytes(plan_.resident_bytes), format_bytes(plan_.streamed_bytes),
             format_bytes(plan_.arena_bytes));
}

void Client::deactivate_locked() noexcept {
  forget_predictions_locked();
  bool leased = false;
  for (auto& state : states_) {
    leased |= state->leases > 0;
    if (state->leases == 0 && state->where != State::Where::absent) drop_locked(*state);
  }
  if (!leased) arena_ = Arena();
}

void Client::unload() {
  std::lock_guard lock(engine_.mutex_);
  deactivate_locked();
  if (engine_.active_ == this) engine_.active_ = nullptr;
}

// ---- Client: passes and the order ----

void Client::begin_pass() {
  std::lock_guard lock(engine_.mutex_);
  if (pass_depth_++ > 0) return;
  recording_.clear();
  for (auto& state : states_) state->used_in_pass = false;
  engine_.activate_locked(*this);
  read_ahead_locked();
}

void Client::end_pass(bool completed) {
  std::lock_guard lock(engine_.mutex_);
  if (--pass_depth_ > 0) return;
  if (!completed) {
    forget_predictions_locked();
    return;
  }
  if (recording_ != order_) {
    log::debug("{}: the order of {} groups differs from the {}", name_, recording_.size(),
               order_is_guess_ ? "registration order" : "last pass");
    adopt_order_locked(std::move(recording_));
  }
  order_is_guess_ = false;
  recording_.clear();
  for (auto& state : states_) state->used_in_pass = false;
  if (engine_.active_ == this) read_ahead_locked();
}

void Client::adopt_order_locked(std::vector<size_t> order) {
  order_ = std::move(order);
  for (Pending& use : pending_) --states_[use.group]->predicted;
  pending_.clear();
  // Keep what is here already and comes first in the new order.
  cursor_ = 0;
  while (options_.wrap_around && cursor_ < order_.size()) {
    State& state = *states_[order_[cursor_]];
    if (state.where == State::Where::absent) break;
    ++state.predicted;
    pending_.push_back({order_[cursor_], cursor_});
    ++cursor_;
  }
  for (auto& state : states_) drop_if_unused_locked(*state);
}

void Client::forget_predictions_locked() noexcept {
  for (Pending& use : pending_) states_[use.group]->predicted = 0;
  pending_.clear();
  cursor_ = 0;
  for (auto& state : states_) drop_if_unused_locked(*state);
}

void Client::read_ahead_locked() {
  engine_.reader_->poll();
  if (!engine_.options_.read_ahead || (pass_depth_ == 0 && order_is_guess_)) return;
  // At most one cycle ahead. `budget` ends the loop where every group of a guessed order was used.
  for (size_t budget = order_.size(); budget > 0 && pending_.size() < order_.size(); --budget) {
    if (cursor_ == order_.size()) {
      if (!options_.wrap_around || order_is_guess_) return;
      cursor_ = 0;
    }
    if (pass_depth_ == 0 && !options_.wrap_around) return;
    const size_t group = order_[cursor_];
    State& state = *states_[group];
    if (!(order_is_guess_ && state.used_in_pass)) {
      if (state.where == State::Where::absent && !start_locked(state)) return;
      ++state.predicted;
      pending_.push_back({group, cursor_});
    }
    ++cursor_;
  }
}

bool Client::evict_one_locked() {
  if (pending_.empty()) return false;
  // A group that was passed over for long will hardly be used in this pass; else the one that is
  // needed last.
  constexpr uint32_t kStale = 32;
  auto victim = std::find_if(pending_.begin(), pending_.end(),
                             [](const Pending& use) { return use.skipped >= kStale; });
  if (victim == pending_.end()) {
    victim = std::prev(pending_.end());
    cursor_ = victim->position;
  }
  State& state = *states_[victim->group];
  pending_.erase(victim);
  --state.predicted;
  if (state.placement == Placement::streamed) ++engine_.report_.dropped;
  drop_if_unused_locked(state);
  return true;
}

// ---- Client: one group ----

bool Client::start_locked(State& state) {
  if (state.extents.empty()) {
    state.where = State::Where::here;  // small slots only
    return true;
  }
  std::byte* into = nullptr;
  if (state.placement == Placement::resident) {
    state.read_buffer = io::AlignedBuffer(state.read_range_bytes);
    if (state.cast_range_bytes > 0) state.cast_buffer = io::AlignedBuffer(state.cast_range_bytes);
    into = state.read_buffer.data();
  } else {
    state.read_offset = arena_.allocate(state.read_range_bytes);
    if (!state.read_offset) return false;
    if (state.cast_range_bytes > 0) {
      state.cast_offset = arena_.allocate(state.cast_range_bytes);
      if (!state.cast_offset) {
        arena_.release(*std::exchange(state.read_offset, std::nullopt));
        return false;
      }
    }
    into = arena_.at(*state.read_offset);
  }
  try {
    std::vector<io::ReadRequest> requests;
    const io::File* checked = nullptr;
    for (const Extent& extent : state.extents) {
      if (extent.file.get() != checked) extent.file->check_unchanged();
      checked = extent.file.get();
      requests.push_back(
          {extent.file, extent.offset, extent.size_bytes, extent.min_bytes, into + extent.place});
    }
    state.started = Clock::now();
    state.ticket = engine_.reader_->submit(std::move(requests));
    state.where = State::Where::loading;
  } catch (...) {
    drop_locked(state);
    throw;
  }
  return true;
}

void Client::start_or_evict_locked(State& state) {
  while (!start_locked(state)) {
    if (evict_one_locked()) continue;
    std::string leased;
    for (const auto& other : states_) {
      if (other->leases > 0)
        leased += fmt::format("{}{} ({})", leased.empty() ? "" : ", ", other->name,
                              format_bytes(other->size_bytes));
    }
    throw_error<BudgetError>(
        "{}: no room for {} ({}) in an arena of {} while these are in use: {}; give more memory",
        name_, state.name, format_bytes(state.arena_bytes()), format_bytes(arena_.size_bytes()),
        leased.empty() ? "none" : leased);
  }
}

void Client::arrive_locked(State& state) {
  if (state.where != State::Where::loading) return;
  try {
    engine_.reader_->wait(state.ticket);
    const bool resident = state.placement == Placement::resident;
    std::byte* read_range = resident ? state.read_buffer.data() : arena_.at(*state.read_offset);
    std::byte* cast_range = nullptr;
    if (state.cast_range_bytes > 0)
      cast_range = resident ? state.cast_buffer.data() : arena_.at(*state.cast_offset);
    state.make_views(read_range, cast_range);
  } catch (...) {
    drop_locked(state);
    throw;
  }
  if (Trace* trace = engine_.options_.trace) {
    trace->complete("read", state.name, state.started, Clock::now(), "reads",
                    {{"bytes", std::to_string(state.read_range_bytes)}});
  }
  state.ticket.reset();
  state.where = State::Where::here;
  const bool all_cast =
      std::all_of(state.slots.begin(), state.slots.end(),
                  [](const SlotPlace& slot) { return slot.cast_place.has_value(); });
  if (all_cast) {  // the stored bytes have served
    if (state.read_offset) arena_.release(*std::exchange(state.read_offset, std::nullopt));
    state.read_buffer = io::AlignedBuffer();
  }
}

void Client::drop_locked(State& state) noexcept {
  if (state.ticket) engine_.reader_->cancel(state.ticket);
  state.ticket.reset();
  if (state.where == State::Where::here) state.detach();
  state.views.clear();
  state.where = State::Where::absent;
  if (state.read_offset) arena_.release(*std::exchange(state.read_offset, std::nullopt));
  if (state.cast_offset) arena_.release(*std::exchange(state.cast_offset, std::nullopt));
  state.read_buffer = io::AlignedBuffer();
  state.cast_buffer = io::AlignedBuffer();
}

void Client::drop_if_unused_locked(State& state) noexcept {
  if (state.leases == 0 && state.predicted == 0 && state.placement == Placement::streamed &&
      state.where != State::Where::absent) {
    drop_locked(state);
  }
}

// ---- Client: leases ----

Lease Client::lease(size_t group) {
  std::lock_guard lock(engine_.mutex_);
  engine_.options_.stop.throw_if_stopped();
  engine_.activate_locked(*this);
  State& state = *states_.at(group);
  if (state.leases > 0) {
    ++state.leases;
    return Lease(this, group);
  }

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
  if (state.where == State::Where::absent) {
    ++report.misses;
    start_or_evict_locked(state);
    if (!predicted && cursor_ < order_.size() && order_[cursor_] == group) ++cursor_;
  } else {
    ++report.hits;
  }
  if (state.where == State::Where::loading) {
    if (!state.ticket->done()) {
      // While this one arrives, the ones behind it can be asked for.
      state.leases = 1;  // holds it against eviction
      try {
        read_ahead_locked();
      } catch (...) {
        state.leases = 0;
        throw;
      }
      state.leases = 0;
    }
    const auto began = Clock::now();
    arrive_locked(state);
    const auto ended = Clock::now();
    report.stall_seconds += std::chrono::duration<double>(ended - began).count();
    if (Trace* trace = engine_.options_.trace)
      trace->complete("wait", state.name, began, ended, "waits");
    state.attach();
  } else if (state.placement == Placement::streamed) {
    state.attach();
  }
  state.leases = 1;
  state.used_in_pass = true;
  state.leased_at = Clock::now();
  if (pass_depth_ > 0) recording_.push_back(group);
  engine_.reader_->poll();
  return Lease(this, group);
}

void Client::release(size_t group) noexcept {
  std::lock_guard lock(engine_.mutex_);
  State& state = *states_[group];
  if (--state.leases > 0) return;
  if (Trace* trace = engine_.options_.trace) {
    trace->complete("compute", state.name, state.leased_at, Clock::now(), "compute");
  }
  if (state.placement == Placement::streamed && !state.extents.empty()) state.detach();
  drop_if_unused_locked(state);
  try {
    if (engine_.active_ == this) read_ahead_locked();
  } catch (const std::exception& error) {
    // The group that could not be asked for is absent: its own lease will meet the error.
    log::debug("{}: reading ahead failed: {}", name_, error.what());
  }
}

}  // namespace ferry::offload
