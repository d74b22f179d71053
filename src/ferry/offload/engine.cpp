#include "ferry/offload/engine.h"

#include <algorithm>
#include <utility>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/base/units.h"
#include "ferry/offload/carrier.h"
#include "ferry/offload/client_state.h"

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

Engine::~Engine() {
  std::unique_lock lock(mutex_);
  std::unique_ptr<Carrier> carrier = std::move(carrier_);
  lock.unlock();  // its thread may be waiting for the mutex
}

Report Engine::report() const {
  std::lock_guard lock(mutex_);
  Report report = report_;
  report.bytes_read = reader_->bytes_read();
  report.small_bytes = held_small_;
  if (carrier_)
    report.host_peak_bytes = std::max(report.host_peak_bytes, carrier_->host_peak_bytes());
  return report;
}

void Engine::unload() {
  turn_.enter();
  {
    std::lock_guard lock(mutex_);
    for (Client* client : clients_) client->drop_all_locked();
    active_ = nullptr;
    drop_memory_locked();
  }
  turn_.leave();
}

void Engine::set_stop_token(StopToken stop) {
  std::lock_guard lock(mutex_);
  options_.stop = std::move(stop);
}

void Engine::announce(std::vector<Announced> next) {
  std::lock_guard lock(mutex_);
  announced_.assign(next.begin(), next.end());
  std::erase_if(announced_, [](const Announced& one) { return one.passes <= 0; });
}

void Engine::set_weights_memory(uint64_t bytes) {
  turn_.enter();
  const uint64_t before = std::exchange(options_.weights_memory_bytes, bytes);
  try {
    std::lock_guard lock(mutex_);
    for (Client* client : clients_) client->make_plan_locked();
    for (Client* client : clients_) client->drop_all_locked();
    active_ = nullptr;
    drop_memory_locked();
  } catch (...) {
    options_.weights_memory_bytes = before;
    turn_.leave();
    throw;
  }
  turn_.leave();
}

// Frees the arena and what carries into it, once nothing is held there.
void Engine::drop_memory_locked() {
  if (!carrier_ || arena_.used_bytes() > 0) return;
  carrier_->synchronize();
  report_.host_peak_bytes = std::max(report_.host_peak_bytes, carrier_->host_peak_bytes());
  std::unique_ptr<Carrier> carrier = std::move(carrier_);
  // Its thread ends when it sees that it is not wanted, which takes the mutex.
  mutex_.unlock();
  carrier.reset();
  mutex_.lock();
  arena_ = Arena();
}

// The arena holds all components together where the budget allows, and each alone in any case.
void Engine::prepare_memory_locked() {
  uint64_t wanted = 0;
  uint64_t largest_read = 0;
  uint64_t all_read = 0;
  for (Client* client : clients_) {
    client->refresh_plan_locked();
    const uint64_t peak = client->plan_.peak_bytes();
    wanted = options_.weights_memory_bytes == 0 ? std::max(wanted, peak) : wanted + peak;
    for (const auto& state : client->states_) {
      for (const Piece& piece : state->pieces) {
        const uint64_t bytes = piece.arriving_footprint(/*on_accelerator=*/false);
        largest_read = std::max(largest_read, bytes);
        all_read += bytes;
      }
    }
  }
  const uint64_t allowed =
      options_.weights_memory_bytes == 0
          ? wanted
          : (options_.weights_memory_bytes - held_small_) / Arena::kAlignment * Arena::kAlignment;
  wanted = std::min(wanted, allowed);
  if (carrier_ && arena_.size_bytes() >= wanted && arena_.size_bytes() <= allowed) return;
  for (Client* client : clients_) client->drop_all_locked();
  drop_memory_locked();
  if (carrier_) {
    throw_error<BudgetError>(
        "the weights' memory cannot be laid out anew ({} wanted) while a group is in use; end the "
        "pass that holds it first",
        format_bytes(wanted));
  }
  arena_ = Arena(Memory::on(options_.device, wanted));
  CarrierContext context{options_, *reader_, arena_, report_, mutex_, [this] {
                           if (active_) active_->read_ahead_quietly_locked();
                         }};
  if (options_.device.is_cpu()) {
    carrier_ = make_cpu_carrier(std::move(context));
    return;
  }
  constexpr uint64_t kStaging = 256ull << 20;
  const uint64_t staging = std::max(2 * largest_read, std::min(kStaging, all_read));
  context.host_memory_bytes = options_.host_memory_bytes;
  if (options_.host_memory_bytes == 0) context.host_memory_bytes = staging;
  if (options_.host_memory_bytes == EngineOptions::kAllWeights)
    context.host_memory_bytes = all_read + staging;
  if (context.host_memory_bytes < largest_read) {
    throw_error<BudgetError>(
        "a host memory budget of {} is too small: the largest piece passes through {} of it",
        format_bytes(context.host_memory_bytes), format_bytes_up(largest_read));
  }
  uint64_t homes = context.host_memory_bytes - std::min(context.host_memory_bytes, staging);
  for (Client* client : clients_) homes -= client->assign_host_homes_locked(homes);
  carrier_ = make_device_carrier(std::move(context));
}

void Engine::activate_locked(Client& client) {
  if (active_ == &client && carrier_) return;
  if (active_ && active_ != &client) active_->deactivate_locked();
  active_ = nullptr;
  prepare_memory_locked();
  active_ = &client;
  std::erase(clients_, &client);
  clients_.push_back(&client);
  const Plan& plan = client.plan_;
  arena_.set_ring_bytes(plan.arena_bytes);
  report_.arena_bytes = plan.arena_bytes;
  report_.resident_bytes = plan.resident_bytes;
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
