#include "ferry/offload/plan_search.h"

#include <algorithm>
#include <numeric>

#include "ferry/offload/arena.h"

namespace ferry::offload {

namespace {

constexpr uint64_t kSmallestPiece = 1 << 20;
constexpr int kStagingPieces = 4;
// Simulated uses of groups a plan may cost: about 0.2 s.
constexpr int64_t kSimulatedUses = 1'000'000;

// Nearer to the bound than this, or better than an evenly spread plan by less, is not worth a less
// even plan: even spreading bears what simulations leave out.
constexpr double kGoodEnough = 1.01;
constexpr int kKicks = 40;
constexpr size_t kFew = 10;
constexpr size_t kStarts = 4, kStartsOfFew = 16;

uint64_t host_need(const GroupCost& group) {
  return group.host_bytes ? group.host_bytes : group.size_bytes;
}

uint64_t stored_need(const GroupCost& group) {
  return group.disk_bytes ? group.disk_bytes : group.size_bytes;
}

// A small generator, so that plans are the same everywhere (std distributions are not).
uint32_t next(uint32_t& state) {
  state ^= state << 13;
  state ^= state >> 17;
  state ^= state << 5;
  return state;
}

// Says yes for `share` of the weights it is shown, spread evenly.
class ErrorDiffusion {
 public:
  explicit ErrorDiffusion(double share) : share_(share) {}
  bool take(double weight) {
    account_ += share_ * weight;
    if (account_ < 0.5 * weight || share_ <= 0) return false;
    account_ -= weight;
    return true;
  }
  void put_back(double weight) { account_ += weight; }

 private:
  double share_, account_ = 0;
};

}  // namespace

uint64_t smallest_host_budget() {
  return 2 * kSmallestPiece;
}

uint64_t arena_need(const GroupCost& group) {
  return Arena::round_up(std::max(group.arena_bytes, group.size_bytes));
}

Staging staging_within(uint64_t from_bytes, uint64_t max_piece_bytes) {
  Staging staging;
  const uint64_t piece = from_bytes / 8 / kStagingPieces / kSmallestPiece * kSmallestPiece;
  staging.piece_bytes =
      std::clamp(piece, kSmallestPiece, std::max(kSmallestPiece, max_piece_bytes));
  const uint64_t pieces = std::clamp<uint64_t>(from_bytes / staging.piece_bytes, 2, kStagingPieces);
  staging.bytes = pieces * staging.piece_bytes;
  return staging;
}

Search::Search(const std::vector<GroupCost>& groups, const PlanOptions& options)
    : groups_(groups), options_(options), simulator_(groups, options) {
  uint64_t kept = 0;
  for (size_t i = 0; i < groups.size(); ++i) {
    if (groups[i].keep_resident) {
      kept += groups[i].size_bytes;
    } else {
      movable_.push_back(i);
    }
  }
  least_arena_ = std::min(options.read_ahead_bytes, (options.budget_bytes - kept) / 2);
  const int64_t uses = static_cast<int64_t>(std::max(options.order.size(), groups.size()));
  evaluations_left_ = static_cast<int>(std::clamp<int64_t>(kSimulatedUses / (4 * uses), 100, 6000));
  lower_bound_ = lower_bound();
}

// No plan is faster: what cannot be resident crosses, and everything computes.
double Search::lower_bound() const {
  const Rates& rates = options_.rates;
  const bool packs = rates.decode_bytes_per_s > 0;
  double compute = 0, total = 0, read_once = 0, least_read_share = 1;
  uint64_t smallest_arena = ~uint64_t{0};
  for (const GroupCost& group : groups_) {
    const uint64_t stored = stored_need(group);
    const double read = static_cast<double>(
        packs && group.pack_bytes > 0 ? std::min(group.pack_bytes, stored) : stored);
    total += static_cast<double>(group.size_bytes);
    read_once += read;
    if (group.size_bytes > 0)
      least_read_share = std::min(least_read_share, read / static_cast<double>(group.size_bytes));
    if (!group.keep_resident) smallest_arena = std::min(smallest_arena, arena_need(group));
    if (options_.order.empty()) compute += group.compute_s;
  }
  for (size_t group : options_.order) compute += groups_[group].compute_s;

  const uint64_t held = options_.budget_bytes - std::min(smallest_arena, options_.budget_bytes);
  const double crossing = std::max(0.0, total - static_cast<double>(held));
  double from_disk = crossing;
  double step = compute;
  if (rates.has_link()) {
    step = std::max(step, crossing / rates.link_bytes_per_s);
    from_disk = std::max(0.0, from_disk - static_cast<double>(options_.host_budget_bytes));
  }
  step = std::max(step, from_disk * least_read_share / rates.disk_bytes_per_s);
  if (options_.passes == 0) return step;
  // The first pass reads everything.
  double first = std::max(compute, read_once / rates.disk_bytes_per_s);
  if (rates.has_link()) first = std::max(first, total / rates.link_bytes_per_s);
  return first + (options_.passes - 1) * step;
}

bool Search::fit(Candidate& candidate) const {
  candidate.resident_bytes = candidate.host_bytes = candidate.arena_bytes = 0;
  candidate.staging = {};
  uint64_t largest = 0, all = 0;
  bool packs = false;
  for (size_t i = 0; i < groups_.size(); ++i) {
    if (candidate.placements[i] == Placement::resident) {
      candidate.resident_bytes += groups_[i].size_bytes;
      continue;
    }
    largest = std::max(largest, arena_need(groups_[i]));
    all += arena_need(groups_[i]);
    if (candidate.homes[i] == Home::host) candidate.host_bytes += host_need(groups_[i]);
    packs |= candidate.homes[i] == Home::pack;
  }
  uint64_t taken = candidate.resident_bytes;
  if (options_.rates.has_link()) {
    const uint64_t host = options_.host_budget_bytes;
    candidate.staging = staging_within(host ? host : ~uint64_t{0}, options_.max_piece_bytes);
    if (host && candidate.host_bytes + candidate.staging.bytes > host) return false;
    if (!host && candidate.host_bytes > 0) return false;
  } else if (packs) {
    candidate.staging = staging_within(options_.budget_bytes, options_.max_piece_bytes);
    taken += candidate.staging.bytes;
  }
  if (taken + largest > options_.budget_bytes) return false;
  const uint64_t spare = (options_.budget_bytes - taken) / Arena::kAlignment * Arena::kAlignment;
  // More than all of them together is of use only against the holes that a ring of unlike sizes
  // has.
  candidate.arena_bytes = std::min(spare, all + largest);
  return candidate.arena_bytes >= std::max(largest, std::min(least_arena_, all));
}

Simulation Search::simulate(const Candidate& candidate, const SimulateOptions& options) {
  return simulator_.run({candidate.placements, candidate.homes, candidate.arena_bytes,
                         candidate.staging.bytes, candidate.staging.piece_bytes},
                        options);
}

// From a cold start, as in life: the cycle that a ring falls into can depend on how it began, and
// with few groups it can be longer than a step.
SimulateOptions Search::quick() const {
  return {.cold = true, .steady_steps = movable_.size() <= 64 ? 4 : 2, .record = false};
}

bool Search::evaluate(Candidate& candidate) {
  if (!fit(candidate)) return false;
  --evaluations_left_;
  const Prediction prediction = simulate(candidate, quick()).prediction;
  double seconds = prediction.step_s;
  if (options_.passes > 0)
    seconds = prediction.first_step_s + (options_.passes - 1) * prediction.step_s;
  // Of two that take as long, the one that moves less.
  uint64_t streamed = 0, total = 1;
  for (size_t i = 0; i < groups_.size(); ++i) {
    total += groups_[i].size_bytes;
    if (candidate.placements[i] == Placement::streamed) streamed += groups_[i].size_bytes;
  }
  candidate.score =
      seconds * (1 + 1e-3 * static_cast<double>(streamed) / static_cast<double>(total));
  return true;
}

// Groups above `largest_streamed` stay; of the others what fits beside an arena of `arena_bytes`,
// spread evenly over the bytes or over the compute time of a step.
Candidate Search::spread(uint64_t arena_bytes, uint64_t largest_streamed, Evenly evenly) const {
  Candidate candidate;
  candidate.placements.assign(groups_.size(), Placement::streamed);
  candidate.homes.assign(groups_.size(), Home::disk);
  uint64_t spare = options_.budget_bytes - std::min(arena_bytes, options_.budget_bytes);
  uint64_t streamed = 0;
  double compute = 0;
  auto keep = [&](size_t i) {
    candidate.placements[i] = Placement::resident;
    spare -= std::min(spare, groups_[i].size_bytes);
  };
  for (size_t i = 0; i < groups_.size(); ++i) {
    compute += groups_[i].compute_s;
    if (groups_[i].keep_resident || arena_need(groups_[i]) > largest_streamed) {
      keep(i);
    } else {
      streamed += groups_[i].size_bytes;
    }
  }
  const double stream_bytes = static_cast<double>(streamed) -
                              std::min(static_cast<double>(spare), static_cast<double>(streamed));
  const double share = 1 - stream_bytes / std::max(1.0, static_cast<double>(streamed));
  ErrorDiffusion diffusion(share);
  double computed = 0, sent = 0;
  for (size_t i = 0; i < groups_.size(); ++i) {
    computed += groups_[i].compute_s;
    if (candidate.placements[i] == Placement::resident) continue;
    const double size = static_cast<double>(groups_[i].size_bytes);
    bool resident;
    if (evenly == Evenly::in_bytes || compute <= 0) {
      resident = diffusion.take(size);
      if (resident && groups_[i].size_bytes > spare) {
        diffusion.put_back(size);
        resident = false;
      }
    } else {
      // Streaming keeps to its share of the time that has passed.
      resident =
          sent + 0.5 * size > stream_bytes * computed / compute && groups_[i].size_bytes <= spare;
    }
    if (resident) {
      keep(i);
    } else {
      sent += size;
    }
  }
  for (size_t i : movable_) {
    if (candidate.placements[i] == Placement::streamed && groups_[i].size_bytes <= spare) keep(i);
  }
  return candidate;
}

// Host memory takes what it has room for of the streamed groups, packs `pack_share` of the rest.
void Search::spread_homes(Candidate& candidate, double pack_share) const {
  uint64_t room = 0, wanted = 0;
  if (options_.rates.has_link() && options_.host_budget_bytes > 0) {
    const Staging staging = staging_within(options_.host_budget_bytes, options_.max_piece_bytes);
    room = options_.host_budget_bytes - std::min(options_.host_budget_bytes, staging.bytes);
  }
  for (size_t i = 0; i < groups_.size(); ++i) {
    if (candidate.placements[i] == Placement::streamed) wanted += host_need(groups_[i]);
  }
  ErrorDiffusion host(
      std::min(1.0, static_cast<double>(room) / std::max(1.0, static_cast<double>(wanted))));
  ErrorDiffusion pack(pack_share);
  auto assign = [&](bool fill) {
    for (size_t i = 0; i < groups_.size(); ++i) {
      if (candidate.placements[i] != Placement::streamed) continue;
      if (fill && candidate.homes[i] == Home::host) continue;
      const uint64_t need = host_need(groups_[i]);
      if (need <= room && (fill || host.take(static_cast<double>(need)))) {
        candidate.homes[i] = Home::host;
        room -= need;
      } else {
        candidate.homes[i] = Home::disk;
      }
    }
  };
  assign(/*fill=*/false);
  if (room > 0) assign(/*fill=*/true);
  if (options_.rates.decode_bytes_per_s <= 0) return;
  for (size_t i = 0; i < groups_.size(); ++i) {
    if (candidate.placements[i] == Placement::streamed && candidate.homes[i] == Home::disk &&
        groups_[i].pack_bytes > 0 && pack.take(static_cast<double>(groups_[i].size_bytes)))
      candidate.homes[i] = Home::pack;
  }
}

void Search::consider(Candidate candidate) {
  if (evaluations_left_ <= 0 || !evaluate(candidate)) return;
  if (best_.placements.empty() || candidate.score < best_.score) best_ = candidate;
  auto place =
      std::upper_bound(starts_.begin(), starts_.end(), candidate,
                       [](const Candidate& a, const Candidate& b) { return a.score < b.score; });
  const bool known = std::any_of(starts_.begin(), starts_.end(), [&](const Candidate& start) {
    return start.placements == candidate.placements && start.homes == candidate.homes;
  });
  if (known) return;
  starts_.insert(place, std::move(candidate));
  if (starts_.size() > (is_few() ? kStartsOfFew : kStarts)) starts_.pop_back();
}

bool Search::is_few() const {
  return movable_.size() <= kFew;
}

bool Search::good_enough() const {
  if (best_.placements.empty()) return false;
  return best_.score <= kGoodEnough * lower_bound_;
}

// All of them, also after one that is good enough: a later one may keep more, and so bear slow
// moments of the disk better.
void Search::start() {
  // The distinct sizes from the largest down: streaming only what is smaller needs less arena.
  std::vector<uint64_t> sizes;
  for (size_t i : movable_) sizes.push_back(arena_need(groups_[i]));
  std::sort(sizes.rbegin(), sizes.rend());
  sizes.erase(std::unique(sizes.begin(), sizes.end()), sizes.end());
  constexpr size_t kThresholds = 12;
  const size_t stride = std::max<size_t>(1, sizes.size() / kThresholds);
  bool packs = options_.rates.decode_bytes_per_s > 0 &&
               std::any_of(groups_.begin(), groups_.end(),
                           [](const GroupCost& group) { return group.pack_bytes > 0; });
  for (size_t s = 0; s < sizes.size(); s += stride) {
    for (double arena : {2.0, 1.0, 1.5, 3.0, 4.0, 8.0}) {
      const uint64_t arena_bytes =
          std::max(least_arena_, static_cast<uint64_t>(arena * static_cast<double>(sizes[s])));
      for (Evenly evenly : {Evenly::in_time, Evenly::in_bytes}) {
        for (double share : {0.0, 1.0, 0.5, 0.25, 0.75}) {
          Candidate candidate = spread(arena_bytes, sizes[s], evenly);
          spread_homes(candidate, share);
          consider(std::move(candidate));
          if (!packs) break;
        }
      }
    }
  }
}

// One random change: of a group's place, of its home, or two groups change places.
bool Search::mutate(Candidate& candidate, uint32_t& random,
                    const std::vector<double>& stalls) const {
  auto& placements = candidate.placements;
  auto& homes = candidate.homes;
  auto any = [&] { return movable_[next(random) % movable_.size()]; };
  auto other_home = [&](size_t i) {
    std::vector<Home> possible;
    for (Home home : {Home::disk, Home::host, Home::pack}) {
      if (home == homes[i]) continue;
      if (home == Home::host && !(options_.rates.has_link() && options_.host_budget_bytes > 0))
        continue;
      if (home == Home::pack &&
          (groups_[i].pack_bytes == 0 || options_.rates.decode_bytes_per_s <= 0))
        continue;
      possible.push_back(home);
    }
    if (possible.empty()) return false;
    homes[i] = possible[next(random) % possible.size()];
    return true;
  };
  // A group at or shortly before a use that had to wait, half of the time.
  size_t first = any();
  if (!stalls.empty() && next(random) % 2 == 0) {
    size_t position = next(random) % stalls.size();
    for (int tries = 0; tries < 4; ++tries) {
      const size_t other = next(random) % stalls.size();
      if (stalls[other] > stalls[position]) position = other;
    }
    position = (position + stalls.size() - next(random) % 3) % stalls.size();
    const size_t group = options_.order.empty() ? position : options_.order[position];
    if (!groups_[group].keep_resident) first = group;
  }
  switch (next(random) % 6) {
    case 0:  // another place
      placements[first] =
          placements[first] == Placement::resident ? Placement::streamed : Placement::resident;
      break;
    case 1:  // another home
      if (placements[first] == Placement::resident || !other_home(first)) return false;
      break;
    case 2: {  // two homes change
      const size_t second = any();
      if (placements[first] == Placement::resident || placements[second] == Placement::resident ||
          homes[first] == homes[second])
        return false;
      std::swap(homes[first], homes[second]);
      if ((homes[first] == Home::pack && groups_[first].pack_bytes == 0) ||
          (homes[second] == Home::pack && groups_[second].pack_bytes == 0))
        return false;
      break;
    }
    default: {  // two places change; sometimes a third group leaves
      const size_t second = any();
      if (placements[first] == placements[second]) return false;
      std::swap(placements[first], placements[second]);
      std::swap(homes[first], homes[second]);
      for (size_t i : {first, second}) {
        if (homes[i] == Home::pack && groups_[i].pack_bytes == 0) homes[i] = Home::disk;
      }
      if (next(random) % 3 == 0) placements[any()] = Placement::streamed;
    }
  }
  // What has become free is taken.
  if (!fit(candidate)) return false;
  if (next(random) % 2 == 0) {
    const size_t begin = next(random) % movable_.size();
    for (size_t k = 0; k < movable_.size(); ++k) {
      const size_t i = movable_[(begin + k) % movable_.size()];
      if (placements[i] == Placement::resident) continue;
      placements[i] = Placement::resident;
      if (!fit(candidate)) placements[i] = Placement::streamed;
      if (movable_.size() > 64 && k > 64) break;
    }
    if (!fit(candidate)) return false;
  }
  return true;
}

void Search::improve(Candidate candidate, int evaluations, uint32_t& random) {
  std::vector<double> stalls = simulate(candidate, {.cold = false, .steady_steps = 1}).stall_s;
  int failures = 0;
  const int enough = static_cast<int>(30 * movable_.size());
  while (evaluations > 0 && evaluations_left_ > 0 && !good_enough() && failures < enough) {
    Candidate changed = candidate;
    ++failures;
    if (!mutate(changed, random, stalls)) continue;
    --evaluations;
    if (!evaluate(changed) || changed.score > candidate.score) continue;
    if (changed.score < candidate.score * (1 - 1e-6)) failures = 0;
    candidate = std::move(changed);
    if (candidate.score < best_.score) best_ = candidate;
    if (failures == 0) stalls = simulate(candidate, {.cold = false, .steady_steps = 1}).stall_s;
  }
}

std::vector<Search::Choice> Search::choices() const {
  std::vector<Choice> all = {{Placement::resident, Home::disk}, {Placement::streamed, Home::disk}};
  if (options_.rates.has_link() && options_.host_budget_bytes > 0)
    all.push_back({Placement::streamed, Home::host});
  if (options_.rates.decode_bytes_per_s > 0) all.push_back({Placement::streamed, Home::pack});
  return all;
}

bool Search::set(Candidate& candidate, size_t group, const Choice& choice) const {
  if (choice.second == Home::pack && groups_[group].pack_bytes == 0) return false;
  candidate.placements[group] = choice.first;
  candidate.homes[group] = choice.second;
  return true;
}

// Every plan there is. False, and nothing tried, if they are too many.
bool Search::try_all() {
  const std::vector<Choice> choices = this->choices();
  int combinations = 1;
  for (size_t i = 0; i < movable_.size(); ++i) {
    combinations *= static_cast<int>(choices.size());
    if (combinations > evaluations_left_) return false;
  }
  for (int combination = 0; combination < combinations; ++combination) {
    Candidate candidate = best_;
    bool possible = true;
    int rest = combination;
    for (size_t group : movable_) {
      possible &= set(candidate, group, choices[static_cast<size_t>(rest) % choices.size()]);
      rest /= static_cast<int>(choices.size());
    }
    if (possible && evaluate(candidate) && candidate.score < best_.score) best_ = candidate;
  }
  return true;
}

// Every change of one group and of every two, until none of them helps. For few groups, where a
// random move may miss the one that does.
void Search::polish(Candidate current) {
  const std::vector<Choice> choices = this->choices();
  for (bool improved = true; improved && !good_enough();) {
    improved = false;
    const Candidate from = current;
    for (size_t a = 0; a < movable_.size(); ++a) {
      for (size_t b = a; b < movable_.size(); ++b) {
        for (size_t k = 0; k < choices.size() * choices.size(); ++k) {
          if (evaluations_left_ <= 0) return;
          Candidate changed = from;
          // Of one group alone where a == b.
          if (a == b && k >= choices.size()) break;
          if (!set(changed, movable_[a], choices[k % choices.size()]) ||
              (a != b && !set(changed, movable_[b], choices[k / choices.size()])))
            continue;
          if (!evaluate(changed) || changed.score >= current.score * (1 - 1e-6)) continue;
          current = std::move(changed);
          if (current.score < best_.score) best_ = current;
          improved = true;
        }
      }
    }
  }
}

// By random moves, as far as the evaluations reach.
void Search::descend() {
  const std::vector<Candidate> starts = starts_;
  const size_t improved = std::min(starts.size(), kStarts);
  const int share = evaluations_left_ / 2 / static_cast<int>(improved) + 1;
  uint32_t random = 2463534242u;
  for (size_t i = 0; i < improved; ++i) improve(starts[i], share, random);
  const bool few = is_few();
  if (few) {
    polish(best_);
    // The best plan can lie far from the best start: a larger arena and hardly a resident, or
    // packs and the staging that comes with them.
    for (const Candidate& candidate : starts) polish(candidate);
  }
  // Then from the best of them after a few blind changes, which leads out of what no single
  // change can leave.
  for (int kick = 0; evaluations_left_ > 0 && !good_enough() && kick < kKicks; ++kick) {
    Candidate kicked = best_;
    for (int changes = 0; changes < 2 + kick % 4; ++changes) {
      Candidate changed = kicked;
      if (mutate(changed, random, {})) kicked = std::move(changed);
    }
    const double before = best_.score;
    if (evaluate(kicked)) improve(std::move(kicked), share, random);
    if (few && best_.score < before) polish(best_);
  }
}

Candidate Search::best() {
  start();
  if (good_enough()) return best_;
  const Candidate even = best_;
  if (!try_all()) descend();
  return even.score <= kGoodEnough * best_.score ? even : best_;
}

}  // namespace ferry::offload
