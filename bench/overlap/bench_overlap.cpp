// How well the engine hides transfers behind compute, and what it costs itself:
//
//   accelerator  the fake accelerator with a set bandwidth: the longer of compute and transfer over
//                the time of both together, by ratio and size of group
//   overhead     microseconds of the engine a group, with groups of a few bytes
//   disk         disk to RAM with calibrated matrix products: time over the limit, which is how
//                long the products and the same reads, into the same memory, take side by side,
//                unsynchronised; a cold pass over what the simulator says of it with the products'
//                time of that pass and the disk's rate of the streamed ones just before and after
//
//   bench_overlap [--part accelerator|overhead|disk]... [--groups LIST] [--ratios LIST]
//                 [--threads LIST] [--total BYTES] [--passes N] [--rounds N]
//                 [--bandwidth BYTES/S] [--folder DIR] [--json FILE]
//
// LIST is comma-separated: --groups 8MiB,64MiB --ratios 0.25,1,4 --threads 1,2. Weights of
// --total bytes (default 2 GiB) go to a temporary file in --folder ($TMPDIR or /tmp). Prints
// tables, and JSON with --json. Medians of --rounds (default 3), and of three times as many cold
// passes, each of which gets other memory.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>
#include <span>
#include <thread>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/base/units.h"
#include "ferry/io/safetensors.h"
#include "ferry/offload/arena.h"
#include "ferry/offload/engine.h"
#include "ferry/offload/simulate.h"
#include "ferry/testing/fake_accelerator.h"
#include "ferry/weights/stub.h"
#include "free_reads.h"
#include "warm_memory.h"

namespace {

using namespace ferry;
namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;
using offload::Client;
using offload::Engine;
using offload::EngineOptions;
using offload::Lease;

struct Options {
  std::vector<std::string> parts;
  std::vector<uint64_t> groups = {8_MiB, 32_MiB, 64_MiB, 128_MiB, 256_MiB};
  std::vector<double> ratios = {0.25, 0.5, 1, 2, 4};
  std::vector<int> threads = {1, 2};
  uint64_t total_bytes = 2_GiB;
  int passes = 5;
  int rounds = 3;
  double bandwidth = 2e9;
  fs::path folder = fs::temp_directory_path();
  std::string json;
};

double seconds_of(const std::function<void()>& run) {
  const auto begin = Clock::now();
  run();
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

double median_of(int rounds, const std::function<double()>& measure) {
  std::vector<double> values;
  for (int i = 0; i < rounds; ++i) values.push_back(measure());
  return median(values);
}

// A checkpoint of `count` tensors of `bytes` each, gone at the end.
class Weights {
 public:
  Weights(const fs::path& folder, size_t count, uint64_t bytes)
      : path_(folder / fmt::format("bench-overlap-{}.safetensors", ::getpid())), bytes_(bytes) {
    std::vector<io::SafetensorsWriter::Entry> entries;
    for (size_t i = 0; i < count; ++i) {
      entries.push_back({fmt::format("w{}", i), io::Dtype::F32, {static_cast<int64_t>(bytes / 4)}});
    }
    io::SafetensorsWriter writer(path_, entries);
    std::vector<std::byte> values(bytes);
    std::mt19937_64 random(1);
    for (size_t i = 0; i + 8 <= values.size(); i += 8) {
      const uint64_t value = random() & 0x3fffffff3fffffffull;  // no NaN
      std::memcpy(values.data() + i, &value, 8);
    }
    for (size_t i = 0; i < count; ++i) writer.write(values);
    writer.finish();
    checkpoint_ = weights::Checkpoint::open_file(path_);
  }
  ~Weights() {
    std::error_code ignored;
    fs::remove(path_, ignored);
  }

  // One group a tensor; the slots are kept in `slots`.
  std::vector<offload::Group> groups(std::vector<at::Tensor>& slots) const {
    std::vector<offload::Group> groups;
    slots.clear();
    for (const weights::StoredTensor& stored : checkpoint_->tensors()) {
      weights::Slot slot{{stored.key}, weights::make_stub(stored.shape, at::kFloat)};
      slots.push_back(slot.tensor);
      groups.push_back({stored.key, {{slot, stored}}, false});
    }
    return groups;
  }
  uint64_t total_bytes() const { return bytes_ * checkpoint_->tensors().size(); }
  uint64_t group_bytes() const { return bytes_; }
  size_t count() const { return checkpoint_->tensors().size(); }
  const weights::Checkpoint& checkpoint() const { return *checkpoint_; }
  void drop_cache() const {
    for (const auto& file : checkpoint_->files()) file->drop_cache();
  }

 private:
  fs::path path_;
  uint64_t bytes_;
  std::shared_ptr<const weights::Checkpoint> checkpoint_;
};

size_t groups_of(const Options& options, uint64_t bytes) {
  return std::clamp<size_t>(options.total_bytes / bytes, 8, 256);
}

void run_pass(Client& client, size_t count, const std::function<void(size_t)>& compute) {
  client.begin_pass();
  for (size_t i = 0; i < count; ++i) {
    Lease lease = client.lease(i);
    compute(i);
  }
  client.end_pass();
}

// ---- the fake accelerator ----

nlohmann::json on_accelerator(const Options& options) {
  using testing::FakeAccelerator;
  const at::Device device = FakeAccelerator::install();
  nlohmann::json rows = nlohmann::json::array();
  fmt::print("accelerator: link of {}\n{:>10} {:>6} {:>10} {:>10} {:>10} {:>11}\n",
             format_rate(options.bandwidth), "group", "ratio", "compute", "transfer", "together",
             "efficiency");
  for (uint64_t bytes : options.groups) {
    const size_t count = std::max<size_t>(groups_of(options, bytes), 12);
    Weights weights(options.folder, count, bytes);
    std::vector<at::Tensor> slots;
    // Seconds a pass in steady state, with `resident` or with a quarter of the weights as arena.
    auto seconds = [&](bool resident, double op_delay_ms) {
      FakeAccelerator::set_options({});
      EngineOptions engine_options;
      engine_options.device = device;
      engine_options.weights_memory_bytes = weights.total_bytes() + 16_MiB;
      if (!resident) engine_options.weights_memory_bytes = weights.total_bytes() / 4 + 1_MiB;
      engine_options.preferred_arena_bytes = engine_options.weights_memory_bytes;
      engine_options.host_memory_bytes = EngineOptions::kAllWeights;
      Engine engine(engine_options);
      Client client(engine, "model", weights.groups(slots));
      at::Tensor x = at::zeros({16}, device);
      auto compute = [&](size_t i) { x = at::add(x, slots[i].narrow(0, 0, 16)); };
      run_pass(client, count, compute);  // from disk to host memory
      FakeAccelerator::drain();
      FakeAccelerator::set_options(
          {.host_to_device_bytes_per_second = options.bandwidth, .op_delay_ms = op_delay_ms});
      run_pass(client, count, compute);
      FakeAccelerator::drain();
      return median_of(options.rounds, [&] {
        const double passes = seconds_of([&] {
          for (int pass = 0; pass < options.passes; ++pass) run_pass(client, count, compute);
          FakeAccelerator::drain();
        });
        return passes / options.passes;
      });
    };
    const double transfer = seconds(false, 0);
    for (double ratio : options.ratios) {
      const double delay = ratio * static_cast<double>(bytes) / options.bandwidth * 1e3;
      const double compute = seconds(true, delay);
      const double together = seconds(false, delay);
      const double efficiency = std::max(compute, transfer) / together;
      fmt::print("{:>10} {:>6} {:>10} {:>10} {:>10} {:>11.3f}\n", format_bytes(bytes), ratio,
                 format_duration(compute), format_duration(transfer), format_duration(together),
                 efficiency);
      rows.push_back({{"group_bytes", bytes},
                      {"ratio", ratio},
                      {"groups", count},
                      {"compute_s", compute},
                      {"transfer_s", transfer},
                      {"together_s", together},
                      {"efficiency", efficiency}});
    }
  }
  FakeAccelerator::set_options({});
  return rows;
}

// ---- overhead ----

nlohmann::json overhead(const Options& options) {
  const at::Device fake = testing::FakeAccelerator::install();
  nlohmann::json rows = nlohmann::json::array();
  fmt::print("\noverhead of a group of 1 KiB, us\n{:>8} {:>7} {:>10} {:>10} {:>10}\n", "groups",
             "device", "resident", "streamed", "its reads");
  for (size_t count : {size_t{1000}, size_t{10000}}) {
    Weights weights(options.folder, count, 1024);
    for (at::Device device : {at::Device(at::kCPU), fake}) {
      std::vector<at::Tensor> slots;
      auto microseconds = [&](bool resident) {
        EngineOptions engine_options;
        engine_options.device = device;
        engine_options.small_slot_bytes = 0;
        engine_options.weights_memory_bytes = count * (resident ? 16_KiB : 1_KiB);
        engine_options.host_memory_bytes = device.is_cpu() ? 0 : EngineOptions::kAllWeights;
        Engine engine(engine_options);
        Client client(engine, "model", weights.groups(slots));
        for (int pass = 0; pass < 3; ++pass) run_pass(client, count, [](size_t) {});
        return median_of(options.rounds, [&] {
          const double passes = seconds_of([&] {
            for (int pass = 0; pass < options.passes; ++pass)
              run_pass(client, count, [](size_t) {});
          });
          return passes / options.passes / static_cast<double>(count) * 1e6;
        });
      };
      // What reading (or copying) alone takes: a page each, as many in flight as may be.
      double moving = 0;
      if (device.is_cpu()) {
        io::ReadEngineOptions read;
        read.queue_depth = 256;
        auto reader = io::make_read_engine(read);
        io::AlignedBuffer into(count * 8_KiB);
        std::vector<io::ReadRequest> requests;
        for (size_t i = 0; i < count; ++i) {
          const weights::StoredTensor& stored = weights.checkpoint().tensors()[i];
          const uint64_t begin = stored.offset / 4096 * 4096;
          const uint64_t end = (stored.offset + stored.size_bytes + 4095) / 4096 * 4096;
          requests.push_back({stored.file, begin, end - begin,
                              stored.offset + stored.size_bytes - begin, into.data() + i * 8_KiB});
        }
        moving = median_of(options.rounds, [&] {
          const double reading = seconds_of([&] {
            for (const io::ReadRequest& request : requests) reader->submit({request});
            reader->wait(reader->submit({requests.back()}));
          });
          return reading / static_cast<double>(count) * 1e6;
        });
      }
      const double resident = microseconds(true);
      const double streamed = microseconds(false);
      fmt::print("{:>8} {:>7} {:>10.2f} {:>10.2f} {:>10.2f}\n", count,
                 device.is_cpu() ? "cpu" : "fake", resident, streamed, moving);
      rows.push_back({{"groups", count},
                      {"device", device.is_cpu() ? "cpu" : "fake"},
                      {"resident_us", resident},
                      {"streamed_us", streamed},
                      {"moving_us", moving}});
    }
  }
  return rows;
}

// ---- disk to RAM ----

// Matrix products for a given time.
class Compute {
 public:
  Compute() : a_(at::randn({256, 256})), b_(at::randn({256, 256})), out_(at::empty({256, 256})) {
    one_s_ = 1e9;
    for (int i = 0; i < 5; ++i) {
      constexpr int kCount = 200;
      one_s_ = std::min(one_s_, seconds_of([&] { run(kCount); }) / kCount);
    }
  }
  int products_for(double seconds) const {
    return std::max(1, static_cast<int>(std::lround(seconds / one_s_)));
  }
  void run(int products) {
    for (int i = 0; i < products; ++i) at::mm_out(out_, a_, b_);
  }

 private:
  at::Tensor a_, b_, out_;
  double one_s_ = 0;
};

// What the simulator says of a cold pass under `plan` with these rates.
double cold_bound(const Weights& weights, const offload::Plan& plan, double compute_s,
                  double disk_bytes_per_s) {
  offload::GroupCost group;
  group.size_bytes = weights.group_bytes();
  group.compute_s = compute_s / static_cast<double>(weights.count());
  const std::vector<offload::GroupCost> groups(weights.count(), group);
  offload::PlanOptions options;
  options.rates.disk_bytes_per_s = disk_bytes_per_s;
  return offload::simulate(groups, options, plan).prediction.first_step_s;
}

// The memory that streamed groups pass through, with the whole pages around each of them.
std::vector<std::span<std::byte>> ring(const Weights& weights, const offload::Plan& plan,
                                       const std::vector<std::byte*>& places) {
  constexpr uint64_t kPage = offload::Arena::kAlignment;
  std::vector<std::span<std::byte>> ring;
  for (size_t i = 0; i < places.size(); ++i) {
    if (plan.placements[i] == offload::Placement::resident) continue;
    const uint64_t lead = reinterpret_cast<uintptr_t>(places[i]) % kPage;
    ring.push_back({places[i] - lead, offload::Arena::round_up(lead + weights.group_bytes())});
  }
  return ring;
}

// One line of the table: products that take `ratio` times as long as the reads.
nlohmann::json from_disk(const Options& options, const Weights& weights, Compute& compute,
                         int threads, double ratio) {
  const size_t count = weights.count();
  std::vector<at::Tensor> slots;
  EngineOptions engine_options;
  engine_options.weights_memory_bytes = weights.total_bytes() / 4 + 1_MiB;
  engine_options.preferred_arena_bytes = engine_options.weights_memory_bytes;
  Engine engine(engine_options);
  Client client(engine, "model", weights.groups(slots));
  bench::FreeReads reads(weights.checkpoint().files(), weights.total_bytes(),
                         engine_options.weights_memory_bytes);
  weights.drop_cache();
  const double reading =
      median_of(options.rounds, [&] { return seconds_of([&] { reads.run(); }); });
  const int products = compute.products_for(ratio * reading / static_cast<double>(count));
  auto compute_pass = [&] {
    for (size_t i = 0; i < count; ++i) compute.run(products);
  };
  std::vector<std::byte*> places(count);  // where each group was last
  // Returns the seconds of the products.
  auto streamed_pass = [&] {
    double computing_s = 0;
    run_pass(client, count, [&](size_t i) {
      places[i] = static_cast<std::byte*>(slots[i].mutable_data_ptr());
      computing_s += seconds_of([&] { compute.run(products); });
    });
    return computing_s;
  };
  for (int pass = 0; pass < 3; ++pass) streamed_pass();
  // What is measured stands between two measurements of what it is held against, since a shared
  // machine is another one a minute later; and both read into the same memory, that of the ring.
  // Nothing looks at the weights, so what is read ahead there may be lost.
  auto unsynchronised = [&] {
    const offload::Plan plan = client.plan();
    bench::FreeReads same_reads(weights.checkpoint().files(), plan.streamed_bytes,
                                ring(weights, plan, places));
    same_reads.run();  // until what the last pass reads ahead is there as well
    const double seconds = seconds_of([&] {
      std::thread reader([&] {
        for (int pass = 0; pass < options.passes; ++pass) same_reads.run();
      });
      for (int pass = 0; pass < options.passes; ++pass) compute_pass();
      reader.join();
    });
    return seconds / options.passes;
  };
  std::vector<double> streamed, limit, over;
  double limit_before = unsynchronised();
  for (int round = 0; round < options.rounds; ++round) {
    streamed_pass();
    const double seconds = seconds_of([&] {
      for (int pass = 0; pass < options.passes; ++pass) streamed_pass();
    });
    streamed.push_back(seconds / options.passes);

    const double limit_after = unsynchronised();
    limit.push_back((limit_before + limit_after) / 2);
    over.push_back(streamed.back() / limit.back());
    limit_before = limit_after;
  }
  const uint64_t streamed_bytes = client.plan().streamed_bytes;
  // Apart from those rounds: memory that was given back is slow again for more than a pass.
  // Products on all processors take a fifth longer in one pass than in the next, so they are timed
  // in each.
  std::vector<double> computing;
  auto reads_while_streaming = [&] {
    const io::ReadTime reads_before = engine.report().reads;
    computing.push_back(streamed_pass());
    return engine.report().reads.since(reads_before);
  };
  std::vector<double> cold_computing, cold, planned, cold_over;
  io::ReadTime before = reads_while_streaming();
  for (int round = 0; round < 3 * options.rounds; ++round) {
    client.unload();
    weights.drop_cache();
    bench::warm_memory(engine_options.weights_memory_bytes);
    cold.push_back(seconds_of([&] { cold_computing.push_back(streamed_pass()); }));

    const io::ReadTime after = reads_while_streaming();
    before += after;
    planned.push_back(cold_bound(weights, client.plan(), cold_computing.back(), before.rate()));
    cold_over.push_back(cold.back() / planned.back());
    before = after;
  }
  fmt::print(
      "{:>10} {:>8} {:>6} {:>8.3f} {:>8.3f} {:>9.3f} {:>8.3f} {:>7.3f} {:>8.3f} {:>8.3f} "
      "{:>7.3f}\n",
      format_bytes(weights.group_bytes()), threads, ratio, median(computing), reading,
      median(streamed), median(limit), median(over), median(cold), median(planned),
      median(cold_over));
  return {{"group_bytes", weights.group_bytes()},
          {"groups", count},
          {"threads", threads},
          {"ratio", ratio},
          {"compute_s", median(computing)},
          {"reads_s", reading},
          {"streamed_s", median(streamed)},
          {"limit_s", median(limit)},
          {"cold_s", median(cold)},
          {"cold_compute_s", median(cold_computing)},
          {"planned_cold_s", median(planned)},
          {"cold_over_planned", median(cold_over)},
          {"cold_over_planned_rounds", cold_over},
          {"streamed_bytes", streamed_bytes},
          {"over_limit", median(over)},
          {"over_limit_rounds", over}};
}

nlohmann::json from_disk(const Options& options) {
  nlohmann::json rows = nlohmann::json::array();
  fmt::print("\ndisk to RAM, arena of a quarter of the weights; seconds a pass\n");
  fmt::print("{:>10} {:>8} {:>6} {:>8} {:>8} {:>9} {:>8} {:>7} {:>8} {:>8} {:>7}\n", "group",
             "threads", "ratio", "compute", "reads", "streamed", "limit", "over", "cold", "planned",
             "over");
  for (uint64_t bytes : options.groups) {
    Weights weights(options.folder, groups_of(options, bytes), bytes);
    for (int threads : options.threads) {
      at::set_num_threads(threads);
      Compute compute;
      for (double ratio : options.ratios) {
        rows.push_back(from_disk(options, weights, compute, threads, ratio));
      }
    }
  }
  return rows;
}

// ---- command line ----

template <class T>
std::vector<T> list(const std::string& text, const std::function<T(const std::string&)>& parse) {
  std::vector<T> values;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    values.push_back(parse(text.substr(begin, end - begin)));
    begin = end + 1;
  }
  return values;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (i + 1 == argc) throw_error<ArgumentError>("{}: a value is missing", name);
    const std::string value = argv[++i];
    if (name == "--part") {
      options.parts.push_back(value);
    } else if (name == "--groups") {
      options.groups = list<uint64_t>(value, [](const auto& text) { return parse_bytes(text); });
    } else if (name == "--ratios") {
      options.ratios = list<double>(value, [](const auto& text) { return std::stod(text); });
    } else if (name == "--threads") {
      options.threads = list<int>(value, [](const auto& text) { return std::stoi(text); });
    } else if (name == "--total") {
      options.total_bytes = parse_bytes(value);
    } else if (name == "--passes") {
      options.passes = std::stoi(value);
    } else if (name == "--rounds") {
      options.rounds = std::stoi(value);
    } else if (name == "--bandwidth") {
      options.bandwidth = static_cast<double>(parse_rate(value));
    } else if (name == "--folder") {
      options.folder = value;
    } else if (name == "--json") {
      options.json = value;
    } else {
      throw_error<ArgumentError>("{}: unknown; see the head of bench_overlap.cpp", name);
    }
  }
  if (options.parts.empty()) options.parts = {"accelerator", "overhead", "disk"};
  return options;
}

}  // namespace

int main(int argc, char** argv) try {
  const Options options = parse(argc, argv);
  c10::InferenceMode inference;
  nlohmann::json result;
  for (const std::string& part : options.parts) {
    if (part == "accelerator") {
      result[part] = on_accelerator(options);
    } else if (part == "overhead") {
      result[part] = overhead(options);
    } else if (part == "disk") {
      result[part] = from_disk(options);
    } else {
      throw_error<ArgumentError>("--part {}: expected accelerator, overhead or disk", part);
    }
  }
  if (!options.json.empty()) std::ofstream(options.json) << result.dump(1) << "\n";
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "{}\n", error.what());
  return 1;
}
