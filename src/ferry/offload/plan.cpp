#include "ferry/offload/plan.h"

#include <algorithm>

#include "ferry/base/error.h"
#include "ferry/base/units.h"

namespace ferry::offload {

namespace {
uint64_t largest(const std::vector<GroupCost>& groups) {
  uint64_t bytes = 0;
  for (const GroupCost& group : groups) bytes = std::max(bytes, group.arena_bytes);
  return bytes;
}
}  // namespace

uint64_t smallest_budget(const std::vector<GroupCost>& groups) { return largest(groups); }

Plan make_plan(const std::vector<GroupCost>& groups, const PlanOptions& options) {
  Plan plan;
  uint64_t total = 0;
  for (const GroupCost& group : groups) total += group.size_bytes;
  if (total <= options.budget_bytes) {
    plan.placements.assign(groups.size(), Placement::resident);
    plan.resident_bytes = total;
    return plan;
  }

  const uint64_t one = largest(groups);
  if (options.budget_bytes < one) {
    const auto& group = *std::max_element(groups.begin(), groups.end(), [](const auto& a, const auto& b) {
      return a.arena_bytes < b.arena_bytes;
    });
    throw_error<BudgetError>(
        "a weights budget of {} is too small: {} alone needs {}; give at least {} ({} to read ahead as well)",
        format_bytes(options.budget_bytes), group.name, format_bytes(one), format_bytes(one), format_bytes(2 * one));
  }
  plan.arena_bytes = std::min(options.budget_bytes, std::max(2 * one, options.preferred_arena_bytes));
  plan.placements.assign(groups.size(), Placement::streamed);
  plan.streamed_bytes = total;

  // Error diffusion: `share` of every byte should be resident; a group becomes resident when the
  // account that its bytes fill covers it.
  uint64_t spare = options.budget_bytes - plan.arena_bytes;
  const double share = static_cast<double>(spare) / static_cast<double>(total);
  double account = 0;
  auto keep = [&](size_t i) {
    plan.placements[i] = Placement::resident;
    plan.resident_bytes += groups[i].size_bytes;
    plan.streamed_bytes -= groups[i].size_bytes;
    spare -= groups[i].size_bytes;
  };
  for (size_t i = 0; i < groups.size(); ++i) {
    account += share * static_cast<double>(groups[i].size_bytes);
    if (groups[i].size_bytes <= spare && account >= 0.5 * static_cast<double>(groups[i].size_bytes)) {
      keep(i);
      account -= static_cast<double>(groups[i].size_bytes);
    }
  }
  for (size_t i = 0; i < groups.size(); ++i) {
    if (plan.placements[i] == Placement::streamed && groups[i].size_bytes <= spare) keep(i);
  }
  return plan;
}

}  // namespace ferry::offload
