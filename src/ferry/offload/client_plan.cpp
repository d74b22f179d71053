// Where a client's groups have their place: planned by sizes, then by the times of passes.
#include <algorithm>
#include <numeric>
#include <utility>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/base/units.h"
#include "ferry/offload/carrier.h"
#include "ferry/offload/client_state.h"
#include "ferry/offload/engine.h"
#include "ferry/offload/simulate.h"

namespace ferry::offload {

using Clock = std::chrono::steady_clock;

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

// Of pieces that are converted where they compute: what was read goes when they are.
uint64_t Client::passing_bytes(const State& state) const {
  uint64_t most = 0;
  for (const Piece& piece : state.pieces) {
    if (engine_.options_.device.is_cpu() && piece.all_converted)
      most = std::max(most, Arena::round_up(piece.read_bytes));
  }
  return most;
}

uint64_t Client::smallest_locked(const std::vector<GroupCost>& costs) const {
  uint64_t kept = 0, passing = 0;
  for (size_t i = 0; i < states_.size(); ++i) {
    if (!costs[i].keep_resident) continue;
    kept += costs[i].size_bytes;
    passing = std::max(passing, passing_bytes(*states_[i]));
  }
  return std::max(smallest_budget(costs), kept + passing);
}

uint64_t Client::least_budget_locked() const {
  return engine_.held_small_ + smallest_locked(costs_locked());
}

namespace {

// Room for the group in use, for half of the next one, which may be left to read when the first is
// released, and for a window behind it, or the disk has little to do just then. At least two
// windows: with only one that holds two groups, a disk that tells of both at once would be idle
// while the first of them is used.
uint64_t read_ahead_bytes(const std::vector<GroupCost>& costs, uint64_t window_bytes) {
  uint64_t bytes = 0, count = 0;
  for (const GroupCost& cost : costs) {
    if (cost.keep_resident) continue;
    bytes += cost.arena_bytes;
    ++count;
  }
  const uint64_t group = count > 0 ? bytes / count : 0;
  return window_bytes + std::max(window_bytes, group + group / 2);
}

}  // namespace

PlanOptions Client::plan_options_locked(const std::vector<GroupCost>& costs) const {
  const uint64_t smallest = smallest_locked(costs);
  const uint64_t least = engine_.held_small_ + smallest;
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
        name_, format_bytes(budget), format_bytes(engine_.held_small_), format_bytes(smallest),
        format_bytes_up(least));
  }
  PlanOptions options{.budget_bytes =
                          (budget - engine_.held_small_) / Arena::kAlignment * Arena::kAlignment};
  if (engine_.options_.preferred_arena_bytes > 0)
    options.preferred_arena_bytes = engine_.options_.preferred_arena_bytes;
  if (plans_by_time_) {
    // What disks of virtual machines were seen to do from one 64 MiB to the next.
    constexpr double kUnevenness = 0.3;
    options.rates.disk_bytes_per_s = measured_[reads_packs_].reads.rate();
    options.rates.disk_unevenness = kUnevenness;
    options.read_ahead_bytes = read_ahead_bytes(costs, engine_.options_.read.window_bytes);
    // The arena is not made anew for it, unless what changed does not fit there.
    if (engine_.carrier_ && engine_.arena_.size_bytes() >= smallest)
      options.budget_bytes = std::min(options.budget_bytes, engine_.arena_.size_bytes());
    options.order = order_;
    options.wrap_around = options_.wrap_around;
  }
  return options;
}

Plan Client::make_plan_locked() const {
  const std::vector<GroupCost> costs = costs_locked();
  PlanOptions options = plan_options_locked(costs);
  Plan plan = make_plan(costs, options);
  // Residents that are converted pass through the ring on their way.
  uint64_t passing = 0;
  for (size_t i = 0; i < states_.size(); ++i) {
    if (plan.placements[i] == Placement::resident)
      passing = std::max(passing, passing_bytes(*states_[i]));
  }
  if (passing > plan.arena_bytes) {
    if (options.budget_bytes >= passing + smallest_budget(costs)) {
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

Prediction Client::predict_locked(const Plan& plan) const {
  const std::vector<GroupCost> costs = costs_locked();
  return simulate(costs, plan_options_locked(costs), plan).prediction;
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
  brings_residents_ = true;
  for (size_t i = 0; i < states_.size(); ++i) {
    State& state = *states_[i];
    state.placement = plan_.placements[i];
    for (Piece& piece : state.pieces) {
      // A piece that is here keeps its place.
      const bool resident = state.placement == Placement::resident;
      if (piece.where == Whereabouts::absent) {
        piece.resident = resident;
      } else if (resident && !piece.resident) {
        engine_.carrier_->keep(piece);
      }
    }
  }
}

void Client::note_compute_locked(Clock::time_point until) {
  if (computing_)
    computing_->compute_s += std::chrono::duration<double>(until - computing_since_).count();
  computing_ = nullptr;
}

Client::Measured Client::measure_locked() const {
  Measured measured{
      .pass_s = std::chrono::duration<double>(Clock::now() - pass_began_).count(),
      .compute_s = {},
      .reads = engine_.reader_->read_time().since(read_before_),
  };
  // Passes in lockstep end as one: each group's compute is that of all of them.
  for (const auto& state : states_) {
    measured.compute_s.push_back(state->compute_s);
    if (state->placement == Placement::resident) continue;
    for (const Piece& piece : state->pieces) measured.compute_s.back() += piece.convert_s;
  }
  return measured;
}

bool Client::has_settled_locked(Measured pass) {
  if (source_is_chosen_) {  // whether its plan still describes it
    constexpr double kTolerance = 1.2;
    const double expected = plan_.prediction.step_s;
    if (std::exchange(brings_residents_, false)) return false;
    if (pass.pass_s < kTolerance * expected && pass.pass_s > expected / kTolerance) {
      counted_passes_ = 0;
      return false;
    }
  }
  constexpr int kFirstPasses = 2;
  // One pass's compute, but all that is known of the disk.
  io::ReadTime reads = pass.reads;
  if (counted_passes_ > 0) reads += fastest_.reads;
  if (counted_passes_++ == 0 || pass.pass_s < fastest_.pass_s) fastest_ = std::move(pass);
  fastest_.reads = reads;
  if (counted_passes_ < (source_is_chosen_ ? patience_ : kFirstPasses) || is_leased_locked())
    return false;
  counted_passes_ = 0;
  // Each time it turns out wrong it takes longer to convince.
  constexpr int kMostPatience = 100;
  if (source_is_chosen_) patience_ = std::min(2 * patience_, kMostPatience);
  return true;
}

bool Client::choose_source_locked() {
  if (should_try_checkpoint_locked()) {
    read_from_locked(/*packs=*/false);
    return false;
  }
  const Measured& measured = measured_[reads_packs_];
  const Measured& other = measured_[!reads_packs_];
  if (other.pass_s > 0 && other.pass_s < measured.pass_s) read_from_locked(!reads_packs_);
  if (other.pass_s > 0) {
    log::debug("{}: a step takes {} from the pack, {} from the checkpoint", name_,
               format_duration(measured_[true].pass_s), format_duration(measured_[false].pass_s));
  }
  return true;
}

void Client::measure_pass_locked() {
  if (!engine_.options_.replan || order_is_guess_ || plan_.streamed_bytes == 0) return;
  if (!engine_.carrier_) return;  // unloaded within the pass
  // On an accelerator a lease's time is the host's: nothing to plan with.
  const bool on_cpu = engine_.options_.device.is_cpu();
  if (source_is_chosen_ && (!on_cpu || plan_.prediction.step_s == 0)) return;
  if (!has_settled_locked(measure_locked())) return;
  measured_[reads_packs_] = fastest_;
  if (!source_is_chosen_) source_is_chosen_ = choose_source_locked();
  if (!source_is_chosen_ || !on_cpu) return;
  const Measured& chosen = measured_[reads_packs_];
  if (chosen.reads.rate() > 0) {
    plan_by_time_locked();
  } else {  // next to nothing is read: the plan serves
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
  if (measured.reads.rate() <= 0) return true;
  double checkpoint_bytes = 0;
  for (const auto& state : states_) {
    if (state->placement == Placement::streamed)
      checkpoint_bytes += static_cast<double>(state->size_bytes);
  }
  return checkpoint_bytes / measured.reads.rate() < measured.pass_s;
}

void Client::read_from_locked(bool packs) {
  drop_all_locked();
  reads_packs_ = packs;
  for (auto& state : states_) make_pieces_locked(*state);
  plan_is_stale_ = true;
}

void Client::make_pieces_locked(State& state) {
  state.pieces = make_pieces(state.group.name, state.group.slots,
                             {.device = engine_.options_.device,
                              .idle_device = idle_device(),
                              .piece_bytes = engine_.options_.piece_bytes,
                              .packed = reads_packs_});
  for (Piece& piece : state.pieces) piece.resident = state.placement == Placement::resident;
}

void Client::plan_by_time_locked() {
  plans_by_time_ = true;
  try {
    Plan plan = make_plan_locked();
    if (plan.peak_bytes() > engine_.arena_.size_bytes()) return;
    if (!plan_is_stale_) {
      // What is gained has to be worth reading anew what stays.
      constexpr double kWorthIt = 0.98;
      const Prediction kept = predict_locked(plan_);
      if (plan.placements == plan_.placements || plan.prediction.step_s > kWorthIt * kept.step_s) {
        plan_.prediction = kept;
        return;
      }
    }
    // From an empty arena: what stays is laid out anew.
    drop_all_locked();
    adopt_plan_locked(std::move(plan));
    plan_is_stale_ = false;
    report_plan_locked();
    ++engine_.report_.replans;
    log::debug(
        "{}: planned again with measured times, reads at {}/s: {} resident, a step of {} bound by "
        "{}",
        name_, format_bytes(static_cast<uint64_t>(measured_[reads_packs_].reads.rate())),
        format_bytes(plan_.resident_bytes), format_duration(plan_.prediction.step_s),
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
    return options_.host_homes && (residents || state.placement == Placement::streamed);
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

}  // namespace ferry::offload
