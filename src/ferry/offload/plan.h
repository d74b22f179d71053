// Which groups stay, which are streamed and from where, and how long a step will take: pure
// functions of sizes, times, budgets and rates. Nothing here touches a file, a device or a clock,
// so a machine that is not here can be planned for. Thread-safe.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ferry::offload {

enum class Placement { resident, streamed };

// Where the bytes of a streamed group wait between two uses: in the checkpoint, in pinned host
// memory (only where a link separates it from compute), or in a lossless pack on disk.
enum class Home { disk, host, pack };

// What planning needs to know of a group.
struct GroupCost {
  std::string name;
  uint64_t size_bytes = 0;   // as the parameters hold it, where compute happens
  uint64_t arena_bytes = 0;  // in the arena: with the over-read at both ends, and room for a cast
  bool keep_resident =
      false;  // it is leased while others are: streaming it would only narrow the arena
  uint64_t disk_bytes = 0;  // read from the checkpoint at each crossing; 0: size_bytes
  uint64_t host_bytes = 0;  // of host memory while homed there, and copied; 0: size_bytes
  uint64_t pack_bytes = 0;  // read from its lossless pack at each crossing; 0: it has none
  double decode_s = 0;      // to decode its pack; 0: size_bytes at Rates::decode_bytes_per_s
  double compute_s = 0;     // of one use
};

// What the machine moves and computes with. The default, all unknown, makes the plan minimise bytes
// instead of time.
struct Rates {
  double disk_bytes_per_s = 0;
  double link_bytes_per_s = 0;    // host to device; 0: compute happens where the disk writes to
  double decode_bytes_per_s = 0;  // of decoded bytes; 0: packs are not used
  double disk_latency_s = 0;      // of each group's first read
  // A disk that is shared, or paced in bursts, reads by so much slower than its rate for a while
  // and as much faster after it: 0.3 is 30%.
  double disk_unevenness = 0;
  double link_latency_s = 0;  // of each copy
  // Compute takes (1 + this) times as long while a read, or a decode, is running beside it: on a
  // CPU they share cores and memory.
  double read_slowdown = 0;
  double decode_slowdown = 0;

  bool known() const { return disk_bytes_per_s > 0; }
  bool has_link() const { return link_bytes_per_s > 0; }
};

// What a step waits for most. `room`: nothing is busy all the time, since the arena (or the
// staging) is too small to read far enough ahead.
enum class Bound { compute, disk, link, decode, room };

struct Prediction {
  double step_s = 0;        // a step in steady state; 0 if the rates are unknown
  double first_step_s = 0;  // the first one, cold: residents are read too
  // Busy in one steady step.
  double compute_s = 0, disk_s = 0, link_s = 0, decode_s = 0;
  uint64_t disk_bytes = 0, link_bytes = 0;  // moved in one steady step
  Bound bound = Bound::compute;
};

struct Plan {
  std::vector<Placement> placements;  // one a group
  uint64_t arena_bytes = 0;
  uint64_t resident_bytes = 0;
  uint64_t streamed_bytes = 0;  // a step, as the parameters hold it
  std::vector<Home> homes;      // one a group; of residents: where they are read from
  uint64_t host_bytes = 0;      // of groups that are homed in host memory
  uint64_t staging_bytes = 0;   // pinned, on the way from disk to a device; or of packed bytes
  uint64_t piece_bytes = 0;     // unit of staging; 0 where there is none
  bool has_link = false;        // staging is host memory then, else it counts where compute happens
  Prediction prediction;

  // What the plan may take of the budget where compute happens.
  uint64_t peak_bytes() const {
    return resident_bytes + arena_bytes + (has_link ? 0 : staging_bytes);
  }
  // Of the budget of pinned host memory.
  uint64_t host_peak_bytes() const { return host_bytes + (has_link ? staging_bytes : 0); }
};

struct PlanOptions {
  uint64_t budget_bytes = 0;
  // Without rates: beyond two largest pieces, more arena only evens out the difference between
  // layers that compute long and layers that read long; beyond this, memory serves better as
  // residents. With rates the simulation decides.
  uint64_t preferred_arena_bytes = 192ull << 20;
  // With rates: room to read into, as much as a disk needs to keep its rate. The arena gets no less
  // where half of the budget is as much.
  uint64_t read_ahead_bytes = 0;
  // Pinned host memory: homes and staging. 0: no homes there, staging as needed.
  uint64_t host_budget_bytes = 0;
  Rates rates = {};
  // The groups in the order in which a step uses them; empty: each once. A group may come twice.
  std::vector<size_t> order = {};
  // The next step's first groups are read during this step's last ones.
  bool wrap_around = true;
  // Runs of the component: what counts is the cold first one and `passes` - 1 steady ones. 0: many,
  // only the steady one counts.
  int passes = 0;
  // The largest unit of transfer through staging; less where the budget is small.
  uint64_t max_piece_bytes = 32ull << 20;
};

// Everything resident if it fits. Else what must stay, an arena, and residents, spread evenly over
// the step's time so that each streamed group has compute to hide behind; and homes in host memory
// and in packs as far as they make the step shorter. With rates: error diffusion gives starting
// points, and local moves improve them by their simulated time (simulate.h). Deterministic.
// Throws BudgetError stating the smallest budget; ArgumentError for an order that names no group.
Plan make_plan(const std::vector<GroupCost>& groups, const PlanOptions& options);

// The least budget that make_plan() accepts.
uint64_t smallest_budget(const std::vector<GroupCost>& groups);
// The least host budget with which a device can be fed from disk: two pieces of staging.
uint64_t smallest_host_budget();

// One letter a group: R resident; streamed from d disk, h host memory, p pack.
std::string pattern(const Plan& plan);
const char* bound_name(Bound bound);

}  // namespace ferry::offload
