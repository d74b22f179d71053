// Inside the planner: the search for the placements and homes with the shortest simulated step.
#pragma once

#include <cstdint>
#include <vector>

#include "ferry/offload/plan.h"
#include "ferry/offload/simulate.h"

namespace ferry::offload {

// Room in the arena that a group takes.
uint64_t arena_need(const GroupCost& group);

struct Staging {
  uint64_t bytes = 0;
  uint64_t piece_bytes = 0;
};
// Four pieces, of at most `max_piece_bytes` and an eighth of `from_bytes` in all; no less than two
// of smallest_host_budget().
Staging staging_within(uint64_t from_bytes, uint64_t max_piece_bytes);

// Placements, homes and what they take of memory.
struct Candidate {
  std::vector<Placement> placements;
  std::vector<Home> homes;
  // Filled by Search::fit().
  uint64_t resident_bytes = 0, host_bytes = 0, arena_bytes = 0;
  Staging staging;
  double score = 0;
};

// REQUIRES: rates are known; the budget is at least smallest_budget().
class Search {
 public:
  Search(const std::vector<GroupCost>& groups, const PlanOptions& options);
  Candidate best();
  // Works out memory; false if the candidate does not fit the budgets.
  bool fit(Candidate& candidate) const;
  // fit(), and its simulated time as the score.
  bool evaluate(Candidate& candidate);
  SimulateOptions quick() const;
  Simulation simulate(const Candidate& candidate, const SimulateOptions& options);

 private:
  enum class Evenly { in_bytes, in_time };
  using Choice = std::pair<Placement, Home>;
  Candidate spread(uint64_t arena_bytes, uint64_t largest_streamed, Evenly evenly) const;
  void spread_homes(Candidate& candidate, double pack_share) const;
  void start();
  void consider(Candidate candidate);
  void improve(Candidate candidate, int evaluations, uint32_t& random);
  std::vector<Choice> choices() const;  // for a group, where it has a pack
  // False if the group cannot be there.
  bool set(Candidate& candidate, size_t group, const Choice& choice) const;
  bool try_all();
  void polish(Candidate current);
  void descend();
  bool mutate(Candidate& candidate, uint32_t& random, const std::vector<double>& stalls) const;
  double lower_bound() const;
  bool good_enough() const;
  bool is_few() const;

  const std::vector<GroupCost>& groups_;
  const PlanOptions& options_;
  Simulator simulator_;
  std::vector<size_t> movable_;  // groups that need not stay
  double lower_bound_ = 0;
  uint64_t least_arena_ = 0;
  std::vector<Candidate> starts_;  // by score
  Candidate best_;
  int evaluations_left_ = 0;
};

}  // namespace ferry::offload
