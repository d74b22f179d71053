#include "ferry/offload/simulate.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ferry/base/error.h"
#include "ferry/offload/arena.h"

namespace ferry::offload {

// ---- ArenaModel ----

ArenaModel::ArenaModel(uint64_t size_bytes) : size_(Arena::round_up(size_bytes)) {}

uint64_t ArenaModel::search(uint64_t begin, uint64_t end, uint64_t size) const {
  auto next = std::upper_bound(taken_.begin(), taken_.end(), begin,
                               [](uint64_t at, const Range& range) { return at < range.offset; });
  uint64_t hole = begin;
  if (next != taken_.begin())
    hole = std::max(hole, std::prev(next)->offset + std::prev(next)->size);
  for (; hole < end; ++next) {
    const uint64_t limit = next == taken_.end() ? size_ : next->offset;
    if (limit >= hole + size) return hole;
    if (next == taken_.end()) break;
    hole = next->offset + next->size;
  }
  return kNone;
}

uint64_t ArenaModel::allocate(uint64_t size_bytes) {
  const uint64_t size = std::max(Arena::round_up(size_bytes), uint64_t{Arena::kAlignment});
  if (taken_.empty()) cursor_ = 0;
  uint64_t offset = search(cursor_, size_, size);
  if (offset == kNone) offset = search(0, cursor_, size);
  if (offset == kNone) return kNone;
  return take(offset, size);
}

uint64_t ArenaModel::allocate_in_turn(uint64_t size_bytes) {
  if (taken_.empty()) return allocate(size_bytes);
  const uint64_t size = std::max(Arena::round_up(size_bytes), uint64_t{Arena::kAlignment});
  const uint64_t offset = cursor_ + size <= size_ ? cursor_ : 0;
  if (search(offset, offset + 1, size) != offset) return kNone;
  return take(offset, size);
}

uint64_t ArenaModel::take(uint64_t offset, uint64_t size) {
  auto place = std::upper_bound(taken_.begin(), taken_.end(), offset,
                                [](uint64_t at, const Range& range) { return at < range.offset; });
  taken_.insert(place, {offset, size});
  cursor_ = offset + size;
  return offset;
}

void ArenaModel::release(uint64_t offset) {
  auto range = std::lower_bound(taken_.begin(), taken_.end(), offset,
                                [](const Range& entry, uint64_t at) { return entry.offset < at; });
  if (range == taken_.end() || range->offset != offset)
    throw_error<Error>("arena model: offset {} was released twice", offset);
  if (offset + range->size == cursor_) cursor_ = offset;
  taken_.erase(range);
}

// ---- Simulator ----

namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();
// What an uneven disk reads slowly before it reads as much fast; and the share of all weights that
// is never less: of a small model a step would not see both.
constexpr double kStretchBytes = 64 << 20;
constexpr double kStretchShare = 1.0 / 16;

// What is left of one group's way through a resource.
struct Request {
  uint32_t group;
  uint32_t pieces;  // to go
  bool started;     // the first piece has gone
};

// First in, first out, without giving memory back.
class Queue {
 public:
  void clear() {
    items_.clear();
    head_ = 0;
  }
  bool empty() const { return head_ == items_.size(); }
  Request& front() { return items_[head_]; }
  void pop() {
    if (++head_ == items_.size()) clear();
  }
  void push(const Request& request) { items_.push_back(request); }

 private:
  std::vector<Request> items_;
  size_t head_ = 0;
};

// A resource that serves one request after another.
struct Server {
  Queue queue;
  bool busy = false;
  bool last_of_group = false;
  uint32_t group = 0;
  double began = 0;
  double ends = kNever;
  double busy_s = 0;    // in what is measured
  double bytes = 0;     // likewise
  uint64_t moving = 0;  // bytes of the request that is being served

  void reset() { *this = Server(); }
};

struct Transit {  // of one group under the schedule
  bool streamed = false, at_host = false, from_pack = false;
  uint32_t pieces = 1;
  double disk_s = 0, decode_s = 0, link_s = 0;                 // of one piece, without latency
  uint64_t disk_bytes = 0, link_bytes = 0, staging_bytes = 0;  // of one piece
};

struct GroupNow {
  enum class Where : uint8_t { absent, loading, here } where = Where::absent;
  uint32_t uses = 0;  // asked for and not computed yet
  uint32_t pieces_to_go = 0;
  bool from_disk = false;  // on its way, or last time
  bool at_home = false;    // its bytes have reached their home in host memory
  uint64_t offset = ArenaModel::kNone;
};

}  // namespace

struct Simulator::State {
  std::vector<GroupCost> groups;
  Rates rates;
  std::vector<size_t> order;
  bool wrap_around;

  Schedule schedule;
  std::vector<Transit> transits;
  std::vector<GroupNow> now;
  ArenaModel arena;
  Server disk, link, decode;
  uint64_t staging_used = 0;
  double stretch_bytes = 0;
  double disk_position = 0;  // in what was read so far, in bytes, within two stretches

  double time = 0;
  size_t asked = 0;   // uses asked for so far, over all steps
  size_t leased = 0;  // uses whose turn has come
  bool cold = false;
  bool computing = false;
  double compute_left = 0, compute_began = 0, compute_busy = 0;
  bool measuring = false;
  std::vector<double> stalls;
  std::vector<Span>* spans = nullptr;

  State(const std::vector<GroupCost>& all, const PlanOptions& options)
      : groups(all), rates(options.rates), order(options.order), wrap_around(options.wrap_around) {
    if (order.empty()) {
      for (size_t i = 0; i < groups.size(); ++i) order.push_back(i);
    }
    double total = 0;
    for (GroupCost& group : groups) {
      group.arena_bytes = std::max(group.arena_bytes, group.size_bytes);
      total += static_cast<double>(group.size_bytes);
    }
    stretch_bytes = std::min(kStretchBytes, std::max(1.0, kStretchShare * total));
    for (size_t group : order) {
      if (group >= groups.size()) {
        throw_error<ArgumentError>("plan: the order names group {}, but there are {}", group,
                                   groups.size());
      }
    }
  }

  void prepare();
  void ask();
  void enqueue(uint32_t group);
  void arrive(uint32_t group);
  double disk_time(const Transit& transit);
  void serve();
  bool start_compute();
  void finish_compute();
  void advance();
  void span(Resource resource, size_t group, double begin, double end) {
    if (spans && end > begin) spans->push_back({resource, group, begin, end});
  }
};

void Simulator::State::prepare() {
  transits.resize(groups.size());
  for (size_t i = 0; i < groups.size(); ++i) {
    const GroupCost& group = groups[i];
    Transit& transit = transits[i] = Transit();
    transit.streamed = schedule.placements[i] == Placement::streamed;
    const Home home = schedule.homes.empty() ? Home::disk : schedule.homes[i];
    transit.from_pack = home == Home::pack && group.pack_bytes > 0;
    transit.at_host = home == Home::host && rates.has_link() && transit.streamed;
    const uint64_t moved = group.host_bytes ? group.host_bytes : group.size_bytes;
    if ((rates.has_link() || transit.from_pack) && schedule.piece_bytes > 0) {
      transit.pieces = static_cast<uint32_t>(
          std::max<uint64_t>(1, (moved + schedule.piece_bytes - 1) / schedule.piece_bytes));
    }
    const double pieces = transit.pieces;
    const uint64_t stored = transit.from_pack  ? group.pack_bytes
                            : group.disk_bytes ? group.disk_bytes
                                               : group.size_bytes;
    transit.disk_bytes = stored / transit.pieces;
    transit.disk_s = static_cast<double>(stored) / rates.disk_bytes_per_s / pieces;
    if (transit.from_pack) {
      double whole = group.decode_s;
      if (whole == 0 && rates.decode_bytes_per_s > 0)
        whole = static_cast<double>(group.size_bytes) / rates.decode_bytes_per_s;
      transit.decode_s = whole / pieces;
    }
    if (rates.has_link()) {
      transit.link_bytes = moved / transit.pieces;
      transit.link_s =
          static_cast<double>(moved) / rates.link_bytes_per_s / pieces + rates.link_latency_s;
    }
    // What goes to host memory is read there, not into staging.
    if (!transit.at_host && (rates.has_link() || transit.from_pack))
      transit.staging_bytes = std::min(moved / transit.pieces, schedule.staging_bytes);
  }
  now.assign(groups.size(), {});
  arena = ArenaModel(schedule.arena_bytes);
  disk.reset();
  link.reset();
  decode.reset();
  staging_used = 0;
  disk_position = 0;
  time = 0;
  asked = leased = 0;
  computing = measuring = false;
  compute_busy = 0;
  stalls.assign(order.size(), 0.0);
  for (size_t i = 0; i < groups.size(); ++i) {
    if (!transits[i].streamed && !cold) now[i].where = GroupNow::Where::here;
    now[i].at_home = transits[i].at_host && !cold;
  }
}

void Simulator::State::enqueue(uint32_t group) {
  GroupNow& state = now[group];
  state.where = GroupNow::Where::loading;
  state.pieces_to_go = transits[group].pieces;
  state.from_disk = !state.at_home;
  state.at_home = transits[group].at_host;
  Server& first = state.from_disk ? disk : link;
  first.queue.push({group, transits[group].pieces, false});
}

// Asks for the uses to come, as long as there is room.
void Simulator::State::ask() {
  const size_t n = order.size();
  const size_t step = leased == 0 ? 0 : (leased - 1) / n;
  // Not beyond the first pass while its order is a guess, nor beyond a step that does not wrap.
  const bool wraps = wrap_around && !(cold && step == 0);
  const size_t limit = wraps ? leased + n : std::min(leased + n, (step + 1) * n);
  while (asked < limit) {
    const uint32_t group = static_cast<uint32_t>(order[asked % n]);
    GroupNow& state = now[group];
    if (state.where == GroupNow::Where::absent) {
      if (transits[group].streamed) {
        const bool somebody_waits = asked + 1 == leased;
        state.offset = somebody_waits ? arena.allocate(groups[group].arena_bytes)
                                      : arena.allocate_in_turn(groups[group].arena_bytes);
        if (state.offset == ArenaModel::kNone) return;
      }
      enqueue(group);
    }
    ++state.uses;
    ++asked;
  }
}

void Simulator::State::arrive(uint32_t group) {
  GroupNow& state = now[group];
  if (--state.pieces_to_go == 0) state.where = GroupNow::Where::here;
}

// Of the next piece, without latency.
double Simulator::State::disk_time(const Transit& transit) {
  if (rates.disk_unevenness <= 0) return transit.disk_s;
  auto bytes = static_cast<double>(transit.disk_bytes);
  const double begin = disk_position;
  const double end = begin + bytes;
  const double period = 2 * stretch_bytes;
  disk_position = std::fmod(end, period);
  // Behind what the same disk would have read evenly: more and more up to the end of the first
  // stretch, then less and less.
  auto behind = [&](double position) {
    const double within = std::fmod(position, period);
    return rates.disk_unevenness * std::min(within, period - within);
  };
  return (bytes + behind(end) - behind(begin)) / rates.disk_bytes_per_s;
}

// Starts what can start on the resources that are idle.
void Simulator::State::serve() {
  auto begin = [&](Server& server, double seconds, uint64_t bytes) {
    Request& request = server.queue.front();
    server.group = request.group;
    server.busy = true;
    server.began = time;
    server.ends = time + seconds;
    server.moving = bytes;
    request.started = true;
    if (--request.pieces == 0) server.queue.pop();
  };
  if (!disk.busy && !disk.queue.empty()) {
    const Request& request = disk.queue.front();
    const Transit& transit = transits[request.group];
    if (staging_used == 0 || staging_used + transit.staging_bytes <= schedule.staging_bytes) {
      staging_used += transit.staging_bytes;
      begin(disk, disk_time(transit) + (request.started ? 0 : rates.disk_latency_s),
            transit.disk_bytes);
    }
  }
  if (!decode.busy && !decode.queue.empty())
    begin(decode, transits[decode.queue.front().group].decode_s, 0);
  if (!link.busy && !link.queue.empty()) {
    const Transit& transit = transits[link.queue.front().group];
    begin(link, transit.link_s, transit.link_bytes);
  }
}

// The next use's compute, if its group is here.
bool Simulator::State::start_compute() {
  const uint32_t group = static_cast<uint32_t>(order[(leased - 1) % order.size()]);
  if (now[group].where != GroupNow::Where::here) return false;
  computing = true;
  compute_left = groups[group].compute_s;
  compute_began = time;
  return true;
}

void Simulator::State::finish_compute() {
  const uint32_t group = static_cast<uint32_t>(order[(leased - 1) % order.size()]);
  computing = false;
  span(Resource::compute, group, compute_began, time);
  GroupNow& state = now[group];
  if (--state.uses == 0 && transits[group].streamed) {
    arena.release(state.offset);
    state.where = GroupNow::Where::absent;
  }
}

// To the next moment at which something ends.
void Simulator::State::advance() {
  const double slowdown = 1 + rates.read_slowdown * disk.busy + rates.decode_slowdown * decode.busy;
  double next = std::min({disk.ends, link.ends, decode.ends});
  const double compute_ends = computing ? time + compute_left * slowdown : kNever;
  const bool compute_is_next = compute_ends <= next;
  next = std::min(next, compute_ends);
  if (next == kNever) throw_error<Error>("plan: the simulation of an impossible plan stands still");
  if (computing) compute_left -= (next - time) / slowdown;
  if (measuring) {
    if (computing) compute_busy += next - time;
    for (Server* server : {&disk, &link, &decode}) {
      if (!server->busy) continue;
      server->busy_s += next - time;
      if (server->ends > server->began)
        server->bytes +=
            static_cast<double>(server->moving) * (next - time) / (server->ends - server->began);
    }
  }
  time = next;

  auto ended = [&](Server& server, Resource resource) {
    if (server.ends > time) return false;
    span(resource, server.group, server.began, server.ends);
    server.busy = false;
    server.ends = kNever;
    return true;
  };
  if (ended(link, Resource::link)) {
    if (now[link.group].from_disk) staging_used -= transits[link.group].staging_bytes;
    arrive(link.group);
  }
  if (ended(decode, Resource::decode)) {
    if (rates.has_link()) {
      link.queue.push({decode.group, 1, true});
    } else {
      staging_used -= transits[decode.group].staging_bytes;
      arrive(decode.group);
    }
  }
  if (ended(disk, Resource::disk)) {
    if (transits[disk.group].from_pack) {
      decode.queue.push({disk.group, 1, true});
    } else if (rates.has_link()) {
      link.queue.push({disk.group, 1, true});
    } else {
      arrive(disk.group);
    }
  }
  if (compute_is_next) finish_compute();
}

Simulator::Simulator(const std::vector<GroupCost>& groups, const PlanOptions& options)
    : state_(std::make_unique<State>(groups, options)) {}
Simulator::~Simulator() = default;

namespace {

// Moves spans to the start of a step that ran from `begin` to `end`, and cuts them there.
std::vector<Span> cut(const std::vector<Span>& spans, double begin, double end) {
  std::vector<Span> inside;
  for (Span span : spans) {
    span.begin_s = std::max(span.begin_s, begin) - begin;
    span.end_s = std::min(span.end_s, end) - begin;
    if (span.end_s > span.begin_s) inside.push_back(span);
  }
  return inside;
}

Bound bound_of(const Prediction& prediction) {
  const std::pair<double, Bound> busy[] = {{prediction.compute_s, Bound::compute},
                                           {prediction.disk_s, Bound::disk},
                                           {prediction.link_s, Bound::link},
                                           {prediction.decode_s, Bound::decode}};
  const auto* most = std::max_element(std::begin(busy), std::end(busy),
                                      [](auto& a, auto& b) { return a.first < b.first; });
  return prediction.step_s > 1.15 * most->first ? Bound::room : most->second;
}

}  // namespace

Simulation Simulator::run(const Schedule& schedule, const SimulateOptions& options) {
  State& s = *state_;
  s.schedule = schedule;
  s.cold = options.cold;
  Simulation result;
  const size_t n = s.order.size();
  if (n == 0) return result;
  std::vector<Span> spans;
  s.spans = options.record ? &spans : nullptr;
  s.prepare();

  const size_t unmeasured = options.cold ? 2 : 1;
  const size_t measured = static_cast<size_t>(std::max(1, options.steady_steps));
  const size_t steps = unmeasured + measured;
  std::vector<double> step_ends;
  s.ask();
  for (size_t use = 0; use < steps * n; ++use) {
    if (use == unmeasured * n) s.measuring = true;
    s.leased = use + 1;
    const double lease_at = s.time;
    s.ask();
    s.serve();
    while (!s.start_compute()) {
      s.advance();
      s.serve();
    }
    if (s.measuring) s.stalls[use % n] += (s.time - lease_at) / static_cast<double>(measured);
    while (s.computing) {
      s.advance();
      if (!s.computing) s.ask();
      s.serve();
    }
    if ((use + 1) % n == 0) step_ends.push_back(s.time);
  }

  Prediction& prediction = result.prediction;
  if (options.cold) prediction.first_step_s = step_ends.front();
  const double share = 1.0 / static_cast<double>(measured);
  prediction.step_s = (step_ends.back() - step_ends[unmeasured - 1]) * share;
  prediction.compute_s = s.compute_busy * share;
  prediction.disk_s = s.disk.busy_s * share;
  prediction.link_s = s.link.busy_s * share;
  prediction.decode_s = s.decode.busy_s * share;
  prediction.disk_bytes = static_cast<uint64_t>(s.disk.bytes * share + 0.5);
  prediction.link_bytes = static_cast<uint64_t>(s.link.bytes * share + 0.5);
  prediction.bound = bound_of(prediction);
  result.stall_s = s.stalls;
  if (options.record) {
    for (auto [server, resource] :
         {std::pair(&s.disk, Resource::disk), std::pair(&s.link, Resource::link),
          std::pair(&s.decode, Resource::decode)}) {
      if (server->busy) s.span(resource, server->group, server->began, s.time);  // under way
    }
    result.spans = cut(spans, step_ends[steps - 2], step_ends.back());
    if (options.cold) result.first_spans = cut(spans, 0, step_ends.front());
  }
  s.spans = nullptr;
  return result;
}

Schedule schedule_of(const Plan& plan) {
  return {plan.placements, plan.homes, plan.arena_bytes, plan.staging_bytes, plan.piece_bytes};
}

Simulation simulate(const std::vector<GroupCost>& groups, const PlanOptions& options,
                    const Plan& plan, const SimulateOptions& simulate_options) {
  return Simulator(groups, options).run(schedule_of(plan), simulate_options);
}

}  // namespace ferry::offload
