// Which groups stay and which are streamed: a pure function of sizes and a budget.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ferry::offload {

enum class Placement { resident, streamed };

// What planning needs to know of a group.
struct GroupCost {
  std::string name;
  uint64_t size_bytes = 0;   // as the parameters hold it
  uint64_t arena_bytes = 0;  // in the arena: with the over-read at both ends, and room for a cast
  bool keep_resident =
      false;  // it is leased while others are: streaming it would only narrow the arena
};

struct Plan {
  std::vector<Placement> placements;  // one a group
  uint64_t arena_bytes = 0;
  uint64_t resident_bytes = 0;
  uint64_t streamed_bytes = 0;  // a step

  // resident + arena: what the plan may take of the budget.
  uint64_t peak_bytes() const { return resident_bytes + arena_bytes; }
};

struct PlanOptions {
  uint64_t budget_bytes = 0;
  // Beyond two largest pieces, more arena only evens out the difference between layers that compute
  // long and layers that read long; beyond this, memory serves better as residents.
  uint64_t preferred_arena_bytes = 192ull << 20;
};

// Everything resident if it fits; else what must stay, an arena of at least two largest pieces
// (one, if there is no room for two), and what is left goes to residents, spread evenly over the
// order so that each streamed piece has compute to hide behind. Throws BudgetError stating the
// smallest budget.
Plan make_plan(const std::vector<GroupCost>& groups, const PlanOptions& options);

// The least budget that make_plan() accepts.
uint64_t smallest_budget(const std::vector<GroupCost>& groups);

}  // namespace ferry::offload
