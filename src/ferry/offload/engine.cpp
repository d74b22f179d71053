#include "ferry/offload/engine.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/base/system_info.h"
#include "ferry/base/units.h"
#include "ferry/offload/carrier.h"
#include "ferry/offload/client_state.h"
#include "ferry/offload/out_of_memory.h"

namespace ferry::offload {

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

// ---- Reservation ----

Reservation::Reservation(Reservation&& other) noexcept
    : engine_(std::exchange(other.engine_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Reservation& Reservation::operator=(Reservation&& other) noexcept {
  if (this != &other) {
    release();
    engine_ = std::exchange(other.engine_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
  }
  return *this;
}

void Reservation::release() noexcept {
  if (!engine_) return;
  Engine& engine = *std::exchange(engine_, nullptr);
  std::lock_guard lock(engine.mutex_);
  engine.asked_reserved_ -= std::exchange(bytes_, 0);
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

// The calling thread's turn, as a scope.
class HeldTurn {
 public:
  explicit HeldTurn(Turn& turn) : turn_(turn) { turn_.enter(); }
  ~HeldTurn() { turn_.leave(); }
  HeldTurn(const HeldTurn&) = delete;
  HeldTurn& operator=(const HeldTurn&) = delete;

 private:
  Turn& turn_;
};

}  // namespace

Engine::Engine(EngineOptions options)
    : options_(std::move(options)),
      reader_(io::make_read_engine(with_depth(options_.read, options_.weights_memory_bytes))) {}

Engine::~Engine() {
  std::unique_lock lock(mutex_);
  std::unique_ptr<Carrier> carrier = std::move(carrier_);
  lock.unlock();  // its thread may be waiting for the mutex
}

Report Engine::report() const {
  std::lock_guard lock(mutex_);
  Report report = report_;
  report.reads = reader_->read_time();
  report.bytes_read = report.reads.bytes;
  report.small_bytes = held_small_;
  if (carrier_)
    report.host_peak_bytes = std::max(report.host_peak_bytes, carrier_->host_peak_bytes());
  return report;
}

void Engine::unload() {
  HeldTurn turn(turn_);
  std::lock_guard lock(mutex_);
  drop_everything_locked();
}

void Engine::set_stop_token(StopToken stop) {
  std::lock_guard lock(mutex_);
  options_.stop = std::move(stop);
}

void Engine::set_trace(Trace* trace) {
  std::lock_guard lock(mutex_);
  options_.trace = trace;
}

void Engine::announce(std::vector<Announced> next) {
  std::lock_guard lock(mutex_);
  announced_.assign(next.begin(), next.end());
  std::erase_if(announced_, [](const Announced& one) { return one.passes <= 0; });
}

void Engine::set_weights_memory(uint64_t bytes) {
  HeldTurn turn(turn_);
  std::lock_guard lock(mutex_);
  apply_reservations_locked();  // what was given back counts no longer
  // Within a pass more may be taken still than is asked for.
  const uint64_t reserved = std::max(reserved_, asked_reserved_);
  if (reserved > 0 && bytes <= reserved) {
    throw_error<BudgetError>("a weights budget of {} is too small: {} of it are reserved",
                             format_bytes(bytes), format_bytes(reserved));
  }
  const uint64_t before = std::exchange(options_.weights_memory_bytes, bytes);
  try {
    for (Client* client : clients_) client->make_plan_locked();
  } catch (...) {
    options_.weights_memory_bytes = before;
    throw;
  }
  drop_everything_locked();
}

Reservation Engine::reserve(uint64_t bytes) {
  HeldTurn turn(turn_);
  std::lock_guard lock(mutex_);
  const uint64_t budget = options_.weights_memory_bytes;
  if (budget == 0) {
    throw ArgumentError(
        "the engine holds as little as its components can do with, so there is nothing to reserve "
        "of it; give it a weights budget");
  }
  const uint64_t taken = asked_reserved_ + least_budget_locked();
  const uint64_t most = budget - std::min(budget, taken);
  if (bytes > most) {
    throw_error<BudgetError>(
        "{} of a weights budget of {} cannot be reserved: {} are reserved already, and weights "
        "need at least {}; at most {} can be",
        format_bytes(bytes), format_bytes(budget), format_bytes(asked_reserved_),
        format_bytes_up(least_budget_locked()), format_bytes(most));
  }
  asked_reserved_ += bytes;
  apply_reservations_locked();
  return Reservation(this, bytes);
}

void Engine::apply_reservations_locked() {
  if (reserved_ == asked_reserved_ || pass_is_running_locked()) return;
  const bool less_room = asked_reserved_ > reserved_;
  reserved_ = asked_reserved_;
  if (!carrier_) return;
  const bool as_it_is =
      less_room ? arena_.size_bytes() <= allowed_arena_locked()
                : std::all_of(clients_.begin(), clients_.end(), [](const Client* client) {
                    return client->plan_.streamed_bytes == 0;
                  });
  if (!as_it_is) drop_everything_locked();
}

bool Engine::pass_is_running_locked() const {
  return std::any_of(clients_.begin(), clients_.end(),
                     [](const Client* client) { return client->pass_depth_ > 0; });
}

uint64_t Engine::least_budget_locked() const {
  uint64_t least = held_small_;
  for (const Client* client : clients_) least = std::max(least, client->least_budget_locked());
  return least;
}

void Engine::drop_everything_locked() {
  for (Client* client : clients_) client->drop_all_locked();
  active_ = nullptr;
  drop_memory_locked();
}

// Frees the arena and what carries into it, once nothing is held there.
void Engine::drop_memory_locked() {
  if (arena_.used_bytes() > 0) return;
  if (carrier_) {
    report_.host_peak_bytes = std::max(report_.host_peak_bytes, carrier_->host_peak_bytes());
    std::unique_ptr<Carrier> carrier = std::move(carrier_);
    // Its thread ends when it sees that it is not wanted, which takes the mutex.
    mutex_.unlock();
    carrier.reset();
    mutex_.lock();
  }
  arena_ = Arena();
}

uint64_t Engine::allowed_arena_locked() const {
  if (budget_locked() == 0) return UINT64_MAX;
  return (budget_locked() - held_small_) / Arena::kAlignment * Arena::kAlignment;
}

// It holds all components together where the budget allows, and each alone in any case.
uint64_t Engine::wanted_arena_locked() const {
  if (budget_locked() > 0) return std::min(together_locked(), allowed_arena_locked());
  uint64_t wanted = 0;
  for (const Client* client : clients_) wanted = std::max(wanted, client->plan_.peak_bytes());
  return wanted;
}

uint64_t Engine::together_locked() const {
  uint64_t together = 0;
  for (const Client* client : clients_) together += client->plan_.peak_bytes();
  return together;
}

bool Engine::holds_all_locked() const {
  return together_locked() <= arena_.size_bytes();
}

uint64_t Engine::host_memory_locked(uint64_t staging, uint64_t all_homes) const {
  if (options_.device.is_cpu()) return 0;
  if (options_.host_memory_bytes == 0) return staging;
  if (options_.host_memory_bytes == EngineOptions::kAllWeights) return all_homes + staging;
  return options_.host_memory_bytes;
}

bool Engine::is_leased_locked() const {
  return std::any_of(clients_.begin(), clients_.end(),
                     [](const Client* client) { return client->is_leased_locked(); });
}

void Engine::prepare_memory_locked() {
  constexpr uint64_t kStaging = 256ull << 20;
  uint64_t largest_read = 0;
  uint64_t all_read = 0, all_homes = 0;
  for (Client* client : clients_) {
    client->refresh_plan_locked();
    for (const auto& state : client->states_) {
      for (const Piece& piece : state->pieces) {
        const uint64_t bytes = piece.arriving_footprint(/*on_accelerator=*/false);
        largest_read = std::max(largest_read, bytes);
        if (client->options_.host_homes) all_homes += bytes;
        all_read += bytes;
      }
    }
  }
  const uint64_t wanted = wanted_arena_locked();
  const uint64_t allowed = budget_locked() == 0 ? wanted : allowed_arena_locked();
  const uint64_t staging = std::max(2 * largest_read, std::min(kStaging, all_read));
  const uint64_t host = host_memory_locked(staging, all_homes);
  if (!options_.device.is_cpu() && host < largest_read) {
    throw_error<BudgetError>(
        "a host memory budget of {} is too small: the largest piece passes through {} of it",
        format_bytes(host), format_bytes_up(largest_read));
  }
  if (carrier_ && arena_.size_bytes() >= wanted && arena_.size_bytes() <= allowed) {
    // A component that came later may want more of host memory, or homes there.
    const bool is_new =
        host > staging && std::any_of(clients_.begin(), clients_.end(),
                                      [](const Client* c) { return !c->has_homes_; });
    const bool serves = options_.device.is_cpu() || carrier_->host_bytes() >= largest_read;
    if (serves && ((!is_new && carrier_->host_bytes() >= host) || is_leased_locked())) return;
  }
  for (Client* client : clients_) client->drop_all_locked();
  drop_memory_locked();
  if (carrier_) {
    throw_error<BudgetError>(
        "the weights' memory cannot be laid out anew ({} wanted) while a group is in use; end the "
        "pass that holds it first",
        format_bytes(wanted));
  }
  allocate_arena_locked();
  CarrierContext context{options_, *reader_, arena_, report_, mutex_, [this] {
                           if (active_) active_->read_ahead_quietly_locked();
                         }};
  if (options_.device.is_cpu()) {
    carrier_ = make_cpu_carrier(std::move(context));
    return;
  }
  context.host_memory_bytes = host;
  uint64_t homes = context.host_memory_bytes - std::min(context.host_memory_bytes, staging);
  const bool take_turns = !holds_all_locked();
  for (Client* client : clients_) {
    homes -= client->assign_host_homes_locked(homes, take_turns);
    client->has_homes_ = true;
  }
  carrier_ = make_device_carrier(std::move(context));
}

// ---- device memory that runs out ----

namespace {

constexpr const char* kWhatHelps =
    "make a smaller picture or fewer at a time, give weights less memory, or end what else uses "
    "the device";

}  // namespace

std::string Engine::describe_plan_locked() const {
  std::string text = fmt::format("{} of small tensors", format_bytes(held_small_));
  for (const Client* client : clients_) {
    text += fmt::format(", {}: {} resident and an arena of {}", client->name_,
                        format_bytes(client->plan_.resident_bytes),
                        format_bytes(client->plan_.arena_bytes));
  }
  if (reserved_ > 0) text += fmt::format(", {} reserved", format_bytes(reserved_));
  return text;
}

void Engine::shrink_locked(uint64_t budget) {
  log::warn("{}: no memory left: weights get {} from now on instead of {}", options_.device.str(),
            format_bytes(budget), format_bytes(held_small_ + wanted_arena_locked()));
  options_.weights_memory_bytes = budget + reserved_;
  for (Client* client : clients_) client->refresh_plan_locked();
  ++report_.shrinks;
}

void Engine::allocate_arena_locked() {
  const uint64_t asked = wanted_arena_locked();
  const uint64_t given = options_.weights_memory_bytes;
  try {
    arena_ = Arena(Memory::on(options_.device, asked));
    return;
  } catch (const c10::OutOfMemoryError&) {
  }
  const std::string plan = describe_plan_locked();
  const DeviceMemory memory = free_cached_memory(options_.device);
  // Activations want some too.
  const uint64_t fits = held_small_ + memory.free_bytes - memory.free_bytes / 10;
  const uint64_t least = least_budget_locked();
  try {
    if (const uint64_t budget = std::max(least, fits); budget < held_small_ + asked)
      shrink_locked(budget);
    arena_ = Arena(Memory::on(options_.device, wanted_arena_locked()));
  } catch (const c10::OutOfMemoryError&) {
    const uint64_t last = wanted_arena_locked();
    options_.weights_memory_bytes = given;  // others may give theirs back
    throw_error<DeviceError>(
        "{}: no memory for weights: {} asked for ({}), then {}, and {} of {} free; the least that "
        "would do is {}; {}",
        options_.device.str(), format_bytes(asked), plan, format_bytes(last),
        format_bytes(memory.free_bytes), format_bytes(memory.total_bytes), format_bytes_up(least),
        kWhatHelps);
  }
}

bool Engine::make_room(const c10::OutOfMemoryError& error, bool again) {
  HeldTurn turn(turn_);
  std::lock_guard lock(mutex_);
  if (options_.device.is_cpu() || pass_is_running_locked()) return false;
  const uint64_t least = least_budget_locked();
  const uint64_t held = held_small_ + wanted_arena_locked();
  const std::string plan = describe_plan_locked();
  drop_everything_locked();
  const DeviceMemory memory = free_cached_memory(options_.device);
  const std::string message = error.what_without_backtrace();
  if (again || carrier_ || held <= least) {
    throw_error<DeviceError>(
        "{}: no memory left for what is computed{}: {}. Weights had {} ({}); the least that would "
        "do is {}. Without the weights that come and go {} of {} are free; {}",
        options_.device.str(), again ? ", also with less for weights" : "", message,
        format_bytes(held), plan, format_bytes_up(least), format_bytes(memory.free_bytes),
        format_bytes(memory.total_bytes), kWhatHelps);
  }
  // What was asked for is missing at least, and more may be asked for after it.
  const uint64_t asked = asked_bytes(message);
  const uint64_t missing = asked > 0 ? std::max(2 * asked, held / 4) : held / 2;
  shrink_locked(std::max(least, held - std::min(held, missing)));
  return true;
}

void Engine::activate_locked(Client& client) {
  if (active_ == &client && carrier_) return;
  if (active_ && active_ != &client) {
    active_->forget_predictions_locked();
    // Its activations were of other sizes.
    if (options_.device.is_cpu()) give_back_free_memory();
  }
  active_ = nullptr;
  prepare_memory_locked();
  active_ = &client;
  std::erase(clients_, &client);
  clients_.push_back(&client);
  const Plan& plan = client.plan_;
  client.report_plan_locked();
  log::debug("{}: {} resident, {} streamed a pass through an arena of {}", client.name_,
             format_bytes(plan.resident_bytes), format_bytes(plan.streamed_bytes),
             format_bytes(plan.arena_bytes));
}

Client* Engine::announced_after_locked(const Client& client) const {
  if (announced_.size() < 2 || announced_.front().client != &client) return nullptr;
  return announced_.front().passes == 1 ? announced_[1].client : nullptr;
}

bool Engine::evict_inactive_locked(const Client& requester) {
  // Least recently active first; what was brought for the next component last.
  Client* next = active_ ? announced_after_locked(*active_) : nullptr;
  for (Client* client : clients_) {
    if (client == &requester || client == active_ || client == next) continue;
    if (client->drop_idle_locked()) return true;
  }
  return next && next != &requester && next->drop_idle_locked();
}

void Engine::note_peak_locked() {
  report_.peak_bytes = std::max(report_.peak_bytes, held_small_ + arena_.peak_bytes());
}

}  // namespace ferry::offload
