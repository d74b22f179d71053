#include "ferry/offload/plan.h"

#include <algorithm>

#include "ferry/base/error.h"
#include "ferry/base/units.h"
#include "ferry/offload/plan_search.h"
#include "ferry/offload/simulate.h"

namespace ferry::offload {

namespace {

uint64_t largest_streamed(const std::vector<GroupCost>& groups) {
  uint64_t bytes = 0;
  for (const GroupCost& group : groups) {
    if (!group.keep_resident) bytes = std::max(bytes, arena_need(group));
  }
  return bytes;
}

uint64_t kept_bytes(const std::vector<GroupCost>& groups) {
  uint64_t bytes = 0;
  for (const GroupCost& group : groups) bytes += group.keep_resident ? group.size_bytes : 0;
  return bytes;
}

// Without rates: an arena of at least two largest pieces (one, if there is no room for two), and
// what is left goes to residents.
void place_by_bytes(const std::vector<GroupCost>& groups, const PlanOptions& options, Plan& plan) {
  const uint64_t one = largest_streamed(groups);
  plan.arena_bytes = std::min(options.budget_bytes - kept_bytes(groups),
                              std::max(2 * one, options.preferred_arena_bytes));
  plan.placements.assign(groups.size(), Placement::streamed);
  uint64_t spare = options.budget_bytes - plan.arena_bytes;
  uint64_t streamed = 0;
  for (const GroupCost& group : groups) streamed += group.size_bytes;
  auto keep = [&](size_t i) {
    plan.placements[i] = Placement::resident;
    streamed -= groups[i].size_bytes;
    spare -= groups[i].size_bytes;
  };
  for (size_t i = 0; i < groups.size(); ++i) {
    if (groups[i].keep_resident) keep(i);
  }

  // Error diffusion: `share` of every byte should be resident; a group becomes resident when the
  // account that its bytes fill covers it.
  const double share =
      static_cast<double>(spare) / static_cast<double>(std::max<uint64_t>(streamed, 1));
  double account = 0;
  for (size_t i = 0; i < groups.size(); ++i) {
    if (plan.placements[i] == Placement::resident) continue;
    account += share * static_cast<double>(groups[i].size_bytes);
    if (groups[i].size_bytes <= spare &&
        account >= 0.5 * static_cast<double>(groups[i].size_bytes)) {
      keep(i);
      account -= static_cast<double>(groups[i].size_bytes);
    }
  }
  for (size_t i = 0; i < groups.size(); ++i) {
    if (plan.placements[i] == Placement::streamed && groups[i].size_bytes <= spare) keep(i);
  }
}

// The least arena, from three of the largest pieces or what is preferred on, that costs no time: a
// simulation has no jitter, so it gets a little more than it shows a use for.
void place_by_time(const std::vector<GroupCost>& groups, const PlanOptions& options, Plan& plan) {
  Search search(groups, options);
  Candidate best = search.best();
  uint64_t largest = 0;
  for (size_t i = 0; i < groups.size(); ++i) {
    if (best.placements[i] == Placement::streamed)
      largest = std::max(largest, arena_need(groups[i]));
  }
  auto seconds = [&](const Candidate& candidate) {
    const Prediction prediction = search.simulate(candidate, search.quick()).prediction;
    return options.passes > 0 ? prediction.first_step_s + (options.passes - 1) * prediction.step_s
                              : prediction.step_s;
  };
  const double shortest = seconds(best);
  for (uint64_t arena =
           std::max({3 * largest, options.preferred_arena_bytes, options.read_ahead_bytes});
       arena < best.arena_bytes; arena *= 2) {
    Candidate smaller = best;
    smaller.arena_bytes = arena;
    if (seconds(smaller) > 1.001 * shortest) continue;
    best = smaller;
    break;
  }
  plan.placements = best.placements;
  plan.homes = best.homes;
  plan.arena_bytes = best.arena_bytes;
  plan.staging_bytes = best.staging.bytes;
  plan.piece_bytes = best.staging.piece_bytes;
}

void add_up(const std::vector<GroupCost>& groups, const PlanOptions& options, Plan& plan) {
  if (plan.homes.empty()) plan.homes.assign(groups.size(), Home::disk);
  plan.has_link = options.rates.has_link();
  std::vector<uint64_t> uses(groups.size(), options.order.empty() ? 1 : 0);
  for (size_t group : options.order) {
    if (group >= groups.size()) {
      throw_error<ArgumentError>("plan: the order names group {}, but there are {}", group,
                                 groups.size());
    }
    ++uses[group];
  }
  for (size_t i = 0; i < groups.size(); ++i) {
    if (plan.placements[i] == Placement::resident) {
      plan.resident_bytes += groups[i].size_bytes;
      plan.homes[i] = Home::disk;
    } else {
      plan.streamed_bytes += uses[i] * groups[i].size_bytes;
      if (plan.homes[i] == Home::host)
        plan.host_bytes += groups[i].host_bytes ? groups[i].host_bytes : groups[i].size_bytes;
    }
  }
  if (options.rates.known()) plan.prediction = simulate(groups, options, plan, {}).prediction;
}

}  // namespace

uint64_t smallest_budget(const std::vector<GroupCost>& groups) {
  return kept_bytes(groups) + largest_streamed(groups);
}

Plan make_plan(const std::vector<GroupCost>& groups, const PlanOptions& options) {
  Plan plan;
  const bool link = options.rates.has_link();
  if (link && options.host_budget_bytes > 0 && options.host_budget_bytes < smallest_host_budget()) {
    throw_error<BudgetError>(
        "a host memory budget of {} is too small: weights on their way from disk to the device "
        "need at least {} of it",
        format_bytes(options.host_budget_bytes), format_bytes(smallest_host_budget()));
  }
  uint64_t total = 0;
  for (const GroupCost& group : groups) total += group.size_bytes;
  if (total <= options.budget_bytes) {
    plan.placements.assign(groups.size(), Placement::resident);
    if (link) {  // they come through it once
      const uint64_t host = options.host_budget_bytes;
      const Staging staging = staging_within(host ? host : ~uint64_t{0}, options.max_piece_bytes);
      plan.staging_bytes = staging.bytes;
      plan.piece_bytes = staging.piece_bytes;
    }
    add_up(groups, options, plan);
    return plan;
  }

  const uint64_t one = largest_streamed(groups);
  const uint64_t kept = kept_bytes(groups);
  if (options.budget_bytes < kept + one) {
    throw_error<BudgetError>(
        "a weights budget of {} is too small: the largest streamed group needs {}, and {} must "
        "stay in memory; give at "
        "least {} ({} to read ahead as well)",
        format_bytes(options.budget_bytes), format_bytes(one), format_bytes(kept),
        format_bytes_up(kept + one), format_bytes_up(kept + 2 * one));
  }
  if (options.rates.known()) {
    place_by_time(groups, options, plan);
  } else {
    place_by_bytes(groups, options, plan);
  }
  add_up(groups, options, plan);
  return plan;
}

std::string pattern(const Plan& plan) {
  std::string letters;
  for (size_t i = 0; i < plan.placements.size(); ++i) {
    if (plan.placements[i] == Placement::resident) {
      letters += 'R';
    } else {
      letters += plan.homes[i] == Home::disk ? 'd' : plan.homes[i] == Home::host ? 'h' : 'p';
    }
  }
  return letters;
}

const char* bound_name(Bound bound) {
  switch (bound) {
    case Bound::compute:
      return "compute";
    case Bound::disk:
      return "disk";
    case Bound::link:
      return "link";
    case Bound::decode:
      return "decode";
    case Bound::room:
      return "room";
  }
  return "";
}

}  // namespace ferry::offload
