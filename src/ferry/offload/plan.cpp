#include "ferry/offload/plan.h"

#include <algorithm>

#include "ferry/base/error.h"
#include "ferry/base/units.h"

namespace ferry::offload {

namespace {
uint64_t largest_streamed(const std::vector<GroupCost>& groups) {
  uint64_t bytes = 0;
  for (const GroupCost& group : groups) {
    if (!group.keep_resident) bytes = std::max(bytes, group.arena_bytes);
  }
  return bytes;
}

uint64_t kept_bytes(const std::vector<GroupCost>& groups) {
  uint64_t bytes = 0;
  for (const GroupCost& group : groups) bytes += group.keep_resident ? group.size_bytes : 0;
  return bytes;
}
}  // namespace

uint64_t smallest_budget(const std::vector<GroupCost>& groups) {
  return kept_bytes(groups) + largest_streamed(groups);
}

Plan make_plan(const std::vector<GroupCost>& groups, const PlanOptions& options) {
  Plan plan;
  uint64_t total = 0;
  for (const GroupCost& group : groups) total += group.size_bytes;
  if (total <= options.budget_bytes) {
    plan.placements.assign(groups.size(), Placement::resident);
    plan.resident_bytes = total;
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
        format_bytes(kept + one), format_bytes(kept + 2 * one));
  }
  plan.arena_bytes =
      std::min(options.budget_bytes - kept, std::max(2 * one, options.preferred_arena_bytes));
  plan.placements.assign(groups.size(), Placement::streamed);
  plan.streamed_bytes = total;
  uint64_t spare = options.budget_bytes - plan.arena_bytes;
  auto keep = [&](size_t i) {
    plan.placements[i] = Placement::resident;
    plan.resident_bytes += groups[i].size_bytes;
    plan.streamed_bytes -= groups[i].size_bytes;
    spare -= groups[i].size_bytes;
  };
  for (size_t i = 0; i < groups.size(); ++i) {
    if (groups[i].keep_resident) keep(i);
  }

  // Error diffusion: `share` of every byte should be resident; a group becomes resident when the
  // account that its bytes fill covers it.
  const double share =
      static_cast<double>(spare) / static_cast<double>(std::max<uint64_t>(plan.streamed_bytes, 1));
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
  return plan;
}

}  // namespace ferry::offload
