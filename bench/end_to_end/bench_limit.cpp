// Streaming against its limit, in one process and alternating: the limit is the time until a
// resident forward and the same reads, unsynchronised and into scratch, are both done
// (docs/architecture.md). Also the resident forward and the reads, each alone.
//
//   bench_limit COMPONENT_DIR INPUTS.safetensors WEIGHTS_MEMORY [THREADS [FORWARDS [ROUNDS]]]
//
// Prints one JSON object: medians over the rounds of seconds a forward. `first_s` is the first
// forward of the process, which also pays for what libraries do once; `cold_s` one with nothing of
// the weights in memory but all else warm; `predicted_...` what the simulation of the plan that is
// in force at the end says of them (0 where next to nothing is read).
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <thread>
#include <utility>

#include "allocator.h"
#include "ferry/base/error.h"
#include "ferry/base/units.h"
#include "ferry/hooks/group_offloading.h"
#include "ferry/models/model.h"
#include "ferry/weights/checkpoint.h"
#include "free_reads.h"
#include "warm_memory.h"

namespace {

using Clock = std::chrono::steady_clock;
using ferry::models::NamedTensors;

double since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

int run(int argc, char** argv) {
  const std::string folder = argv[1];
  const uint64_t budget = ferry::parse_bytes(argv[3]);
  const int threads = argc > 4 ? std::atoi(argv[4]) : 1;
  const int forwards = argc > 5 ? std::atoi(argv[5]) : 5;
  const int rounds = argc > 6 ? std::atoi(argv[6]) : 3;
  at::set_num_threads(threads);
  c10::InferenceMode inference;

  NamedTensors inputs;
  auto file = ferry::weights::Checkpoint::open_file(argv[2]);
  auto streamed = ferry::models::load_model(folder);
  for (const auto& stored : file->tensors()) {
    at::Tensor tensor = ferry::weights::read_stored(stored);
    bool exact =
        stored.key.ends_with("_ids") || stored.key == "timestep" || stored.key == "guidance";
    inputs[stored.key] = exact ? tensor : tensor.to(streamed->dtype());
  }
  ferry::offload::EngineOptions options;
  options.weights_memory_bytes = budget;
  auto engine = std::make_shared<ferry::offload::Engine>(options);
  auto offloading = ferry::hooks::apply_group_offloading(*streamed, streamed->binding(), engine);
  auto resident = ferry::models::load_model(folder);
  resident->load_weights();

  auto drop = [&] {
    for (const auto& part : resident->binding()->checkpoint->files()) part->drop_cache();
  };
  auto forward = [&](ferry::models::Model& model) {
    return model.forward_named("forward", inputs, {});
  };
  drop();
  auto begin = Clock::now();
  NamedTensors out_streamed = forward(*streamed);
  const double first = since(begin);
  NamedTensors out_resident = forward(*resident);
  for (const auto& [name, tensor] : out_resident) {
    if (!tensor.equal(out_streamed.at(name)))
      ferry::throw_error<ferry::Error>("{} differs between streamed and resident", name);
  }
  for (int i = 0; i < 3; ++i) forward(*streamed);  // the plan follows the first passes' times

  ferry::offload::Plan plan;
  std::optional<ferry::bench::FreeReads> reads;
  auto follow_plan = [&] {  // as much is read as is streamed
    const uint64_t before = std::exchange(plan, offloading->client().plan()).streamed_bytes;
    if (reads && before == plan.streamed_bytes) return;
    reads.emplace(resident->binding()->checkpoint->files(), plan.streamed_bytes, plan.arena_bytes);
    reads->run();  // touches the scratch
  };
  follow_plan();

  std::vector<double> cold, streaming, stalls, limit, computing, reading;
  for (int round = 0; round < rounds; ++round) {
    forward(*streamed);
    const double stalled = engine->report().stall_seconds;
    begin = Clock::now();
    for (int i = 0; i < forwards; ++i) forward(*streamed);
    streaming.push_back(since(begin) / forwards);
    stalls.push_back((engine->report().stall_seconds - stalled) / forwards);
    follow_plan();

    reads->run();  // until what the last forward reads ahead is there as well
    begin = Clock::now();
    std::thread reader([&] {
      for (int i = 0; i < forwards; ++i) reads->run();
    });
    for (int i = 0; i < forwards; ++i) forward(*resident);
    reader.join();
    limit.push_back(since(begin) / forwards);

    begin = Clock::now();
    forward(*resident);
    computing.push_back(since(begin));
    begin = Clock::now();
    reads->run();
    reading.push_back(since(begin));
  }
  // Apart from the rounds: memory that was given back is slow again for more than a forward.
  for (int round = 0; round < rounds; ++round) {
    engine->unload();
    drop();
    ferry::bench::warm_memory(budget);
    begin = Clock::now();
    forward(*streamed);
    cold.push_back(since(begin));
  }
  const auto report = engine->report();
  fmt::print(
      "{{\"threads\": {}, \"weights_memory\": {}, \"streamed_bytes\": {}, \"arena_bytes\": {}, "
      "\"resident_bytes\": {}, "
      "\"first_s\": {:.4f}, \"cold_s\": {:.4f}, \"predicted_cold_s\": {:.4f}, "
      "\"predicted_step_s\": {:.4f}, "
      "\"streamed_s\": {:.4f}, \"limit_s\": {:.4f}, \"ratio\": {:.4f}, \"compute_s\": {:.4f}, "
      "\"reads_s\": {:.4f}, \"streamed_rounds\": [{:.4f}], \"stall_rounds\": [{:.4f}], "
      "\"limit_rounds\": [{:.4f}], \"misses\": {}, \"dropped\": {}}}\n",
      threads, budget, plan.streamed_bytes, plan.arena_bytes, plan.resident_bytes, first,
      median(cold), plan.prediction.first_step_s, plan.prediction.step_s, median(streaming),
      median(limit), median(streaming) / median(limit), median(computing), median(reading),
      fmt::join(streaming, ", "), fmt::join(stalls, ", "), fmt::join(limit, ", "), report.misses,
      report.dropped);
  return 0;
}

}  // namespace

int main(int argc, char** argv) try {
  ferry::cli::set_up_allocator();
  if (argc < 4) {
    fmt::print(stderr,
               "usage: {} COMPONENT_DIR INPUTS WEIGHTS_MEMORY [THREADS [FORWARDS [ROUNDS]]]\n",
               argv[0]);
    return 2;
  }
  return run(argc, argv);
} catch (const std::exception& error) {
  fmt::print(stderr, "{}\n", error.what());
  return 1;
}
