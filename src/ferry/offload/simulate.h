// A step in simulated time: compute, disk, link and decoder as they will overlap under a plan.
//
// The model is the engine's: groups are asked for in order, at most one step ahead, as soon as the
// arena has a range for them (next-fit, kept until the group's compute ends). A group's bytes then
// go
//   disk -> arena                                  where compute reads what the disk wrote
//   disk -> staging -> link -> arena               to a device, piece by piece
//   host -> link -> arena                          from a home in host memory
//   disk (packed) -> staging -> decode -> … as above     from a pack
// and each resource serves its requests one after another, in the order in which they become
// ready. In the first step residents are read as well, and nothing is read beyond its end.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "ferry/offload/plan.h"

namespace ferry::offload {

enum class Resource { compute, disk, link, decode };

// What one resource did from begin_s to end_s, in seconds from the start of the step.
struct Span {
  Resource resource;
  size_t group;
  double begin_s, end_s;
};

// What is simulated: the part of a plan that decides.
struct Schedule {
  std::vector<Placement> placements;
  std::vector<Home> homes;
  uint64_t arena_bytes = 0;
  uint64_t staging_bytes = 0;
  uint64_t piece_bytes = 0;
};
Schedule schedule_of(const Plan& plan);

struct SimulateOptions {
  // The first step with nothing in memory. Without it, steps start with residents in place, and
  // first_step_s is 0.
  bool cold = true;
  int steady_steps = 4;  // averaged, after one that is not counted
  bool record = false;   // spans
};

struct Simulation {
  Prediction prediction;
  std::vector<double> stall_s;    // compute waited before each use of the order, a steady step
  std::vector<Span> spans;        // of the last steady step, cut at its borders
  std::vector<Span> first_spans;  // of the cold step
};

// Simulates one set of groups under many schedules. Not thread-safe: runs reuse its memory.
class Simulator {
 public:
  // Throws ArgumentError if the order names a group that does not exist.
  Simulator(const std::vector<GroupCost>& groups, const PlanOptions& options);
  ~Simulator();
  // REQUIRES: every streamed group fits the arena, rates are known.
  Simulation run(const Schedule& schedule, const SimulateOptions& options = {});

 private:
  struct State;
  std::unique_ptr<State> state_;
};

Simulation simulate(const std::vector<GroupCost>& groups, const PlanOptions& options,
                    const Plan& plan, const SimulateOptions& simulate_options = {});

// The arena's ranges without its memory: the same answers as Arena gives (a test compares them).
class ArenaModel {
 public:
  explicit ArenaModel(uint64_t size_bytes = 0);
  // The offset, or kNone if no hole is large enough.
  uint64_t allocate(uint64_t size_bytes);
  uint64_t allocate_in_turn(uint64_t size_bytes);
  void release(uint64_t offset);

  static constexpr uint64_t kNone = ~uint64_t{0};

 private:
  struct Range {
    uint64_t offset, size;
  };
  uint64_t search(uint64_t begin, uint64_t end, uint64_t size) const;
  uint64_t take(uint64_t offset, uint64_t size);
  std::vector<Range> taken_;  // by offset
  uint64_t size_ = 0;
  uint64_t cursor_ = 0;
};

}  // namespace ferry::offload
