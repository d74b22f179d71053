// The engine's accelerator path, on the fake accelerator: the same code as on a GPU.
#include <ATen/ATen.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <random>

#include "ferry/base/error.h"
#include "ferry/base/trace.h"
#include "ferry/io/safetensors.h"
#include "ferry/offload/engine.h"
#include "ferry/offload/out_of_memory.h"
#include "ferry/testing/fake_accelerator.h"
#include "ferry/weights/stub.h"

namespace ferry::offload {
namespace {

namespace fs = std::filesystem;
using ferry::testing::FakeAccelerator;
using ferry::testing::FakeAcceleratorOptions;

// Groups of one square weight each; a pass multiplies its way through them.
class AcceleratorTest : public ::testing::Test {
 protected:
  static constexpr int64_t kSide = 96;  // 36 KiB in float32
  static constexpr size_t kGroups = 8;

  AcceleratorTest() : device_(FakeAccelerator::install()) {
    FakeAccelerator::set_options({});
    std::string name = ::testing::TempDir() + "/accelerator.XXXXXX";
    folder_ = ::mkdtemp(name.data());
    at::manual_seed(4);
    std::vector<io::SafetensorsWriter::Entry> entries;
    for (size_t i = 0; i < kGroups; ++i) {
      entries.push_back({"w" + std::to_string(i), io::Dtype::F32, {kSide, kSide}});
      weights_.push_back(at::randn({kSide, kSide}) * 0.1);
    }
    io::SafetensorsWriter writer(folder_ / "model.safetensors", entries);
    for (const at::Tensor& weight : weights_)
      writer.write({static_cast<const std::byte*>(weight.const_data_ptr()), weight.nbytes()});
    writer.finish();
    input_ = at::randn({4, kSide});
    expected_ = input_;
    for (const at::Tensor& weight : weights_) expected_ = at::linear(expected_, weight);
  }
  ~AcceleratorTest() override {
    FakeAccelerator::set_options({});
    fs::remove_all(folder_);
  }

  std::vector<Group> groups(at::ScalarType wanted = at::kFloat) {
    auto checkpoint = weights::Checkpoint::open_file(folder_ / "model.safetensors");
    std::vector<Group> groups;
    slots_.clear();
    for (size_t i = 0; i < kGroups; ++i) {
      const weights::StoredTensor* stored = checkpoint->find("w" + std::to_string(i));
      weights::Slot slot{{stored->key}, weights::make_stub(stored->shape, wanted)};
      slots_.push_back(slot.tensor);
      groups.push_back({stored->key, {{slot, *stored}}, false});
    }
    return groups;
  }

  EngineOptions options(uint64_t budget, uint64_t host = 0) const {
    EngineOptions options;
    options.device = device_;
    options.weights_memory_bytes = budget;
    options.host_memory_bytes = host;
    options.preferred_arena_bytes = 80 << 10;
    options.small_slot_bytes = 0;
    return options;
  }

  // Enqueues a pass; the host does not wait for it.
  at::Tensor enqueue(Client& client) {
    at::Tensor x = on_device_;
    client.begin_pass();
    for (size_t i = 0; i < kGroups; ++i) {
      Lease lease = client.lease(i);
      x = at::linear(x, slots_[i]);
    }
    client.end_pass();
    return x;
  }
  bool right(const at::Tensor& x) const { return x.to(at::kCPU).equal(expected_); }
  void put_input() { on_device_ = input_.to(device_); }

  at::Device device_;
  fs::path folder_;
  std::vector<at::Tensor> weights_, slots_;
  at::Tensor input_, expected_, on_device_;
};

TEST_F(AcceleratorTest, StreamsFromDiskAndFromHostMemoryBitForBit) {
  put_input();
  for (uint64_t budget : {uint64_t{80} << 10, uint64_t{160} << 10, uint64_t{4} << 20}) {
    for (uint64_t host : {uint64_t{0}, uint64_t{120} << 10, EngineOptions::kAllWeights}) {
      FakeAccelerator::drain();
      const uint64_t before = FakeAccelerator::live_bytes();
      FakeAccelerator::reset_peak();
      Engine engine(options(budget, host));
      Client client(engine, "model", groups());
      const uint64_t stubs = FakeAccelerator::live_bytes() - before;
      for (int pass = 0; pass < 4; ++pass) EXPECT_TRUE(right(enqueue(client)));
      Report report = engine.report();
      // With little staging, or on a machine that is slow to free it, some groups can be asked for
      // only when they are needed.
      if (host != 120 << 10) {
        EXPECT_LE(report.misses, report.leases / 8);
      }
      EXPECT_LE(report.peak_bytes, budget);
      // What the device holds beside the stubs: the plan, and the pass's activations.
      EXPECT_LE(FakeAccelerator::peak_bytes() - before - stubs, budget + (64 << 10));
      if (host > 0 && host != EngineOptions::kAllWeights) {
        EXPECT_LE(report.host_peak_bytes, host);
      }
      if (host == EngineOptions::kAllWeights) {
        const uint64_t read = engine.report().bytes_read;
        EXPECT_TRUE(right(enqueue(client)));
        EXPECT_EQ(engine.report().bytes_read, read) << "all of it is in host memory";
      }
    }
  }
}

// Else the disk would have nothing to do while the groups from host memory pass.
TEST_F(AcceleratorTest, GroupsInHostMemoryAreSpreadOverTheStep) {
  put_input();
  constexpr uint64_t kGroup = 40 << 10;
  Trace trace;
  EngineOptions options = AcceleratorTest::options(80 << 10, (kGroups + kGroups / 2) * kGroup);
  options.trace = &trace;
  Engine engine(options);
  Client client(engine, "model", groups());
  for (int pass = 0; pass < 3; ++pass) EXPECT_TRUE(right(enqueue(client)));
  const auto events = nlohmann::json::parse(trace.to_json()).at("traceEvents");
  std::map<std::string, int> reads;
  for (const auto& event : events)
    if (event.value("cat", "") == "read") ++reads[event.at("name")];
  size_t in_host_memory = 0;
  for (size_t i = 0; i < kGroups; ++i) {
    const bool here = reads["w" + std::to_string(i)] == 1;
    const bool before = i > 0 && reads["w" + std::to_string(i - 1)] == 1;
    in_host_memory += here;
    EXPECT_FALSE(here && before) << "w" << i;
  }
  EXPECT_GE(in_host_memory, kGroups / 2 - 1);
}

TEST_F(AcceleratorTest, TheHostWaitsForNothingOnTheDevice) {
  put_input();
  FakeAccelerator::set_options({.op_delay_ms = 1});
  Engine engine(options(80 << 10, EngineOptions::kAllWeights));
  Client client(engine, "model", groups());
  std::vector<at::Tensor> results = {enqueue(client), enqueue(client)};
  FakeAccelerator::drain();
  FakeAccelerator::reset_counters();
  for (int pass = 0; pass < 3; ++pass) results.push_back(enqueue(client));
  EXPECT_THAT(FakeAccelerator::counters().host_synchronizations, ::testing::IsEmpty());
  for (const at::Tensor& result : results) EXPECT_TRUE(right(result));
}

// Each wait is there for a reason: without it the results are wrong, under the schedule that shows
// it. With both, the same schedules are right.
TEST_F(AcceleratorTest, EachEventWaitMatters) {
  put_input();
  const FakeAcceleratorOptions late_copies{.copy_delay_ms = 3};
  const FakeAcceleratorOptions late_operations{.op_delay_ms = 3};
  auto all_right = [&](const FakeAcceleratorOptions& schedule, EngineOptions::Faults faults) {
    FakeAccelerator::set_options(schedule);
    EngineOptions options = AcceleratorTest::options(80 << 10, EngineOptions::kAllWeights);
    options.faults = faults;
    Engine engine(options);
    Client client(engine, "model", groups());
    bool right = true;
    for (int pass = 0; pass < 3; ++pass) right &= this->right(enqueue(client));
    FakeAccelerator::drain();
    return right;
  };
  EXPECT_TRUE(all_right(late_copies, {}));
  EXPECT_TRUE(all_right(late_operations, {}));
  EXPECT_FALSE(all_right(late_copies, {.skip_wait_for_copy = true}));
  EXPECT_FALSE(all_right(late_operations, {.skip_wait_for_compute = true}));
}

TEST_F(AcceleratorTest, RandomDelaysChangeNothing) {
  put_input();
  for (uint64_t seed = 0; seed < 10; ++seed) {
    FakeAccelerator::set_options({.random_delay_ms = 0.5, .seed = seed});
    Engine engine(options(100 << 10, seed % 2 ? EngineOptions::kAllWeights : 0));
    Client client(engine, "model", groups());
    for (int pass = 0; pass < 3; ++pass) EXPECT_TRUE(right(enqueue(client)));
  }
}

TEST_F(AcceleratorTest, CastsOnTheWay) {
  put_input();
  on_device_ = on_device_.to(at::kDouble);
  at::Tensor expected = input_.to(at::kDouble);
  for (const at::Tensor& weight : weights_) expected = at::linear(expected, weight.to(at::kDouble));
  Engine engine(options(200 << 10));
  Client client(engine, "model", groups(at::kDouble));
  for (int pass = 0; pass < 3; ++pass) EXPECT_TRUE(enqueue(client).to(at::kCPU).equal(expected));
}

TEST_F(AcceleratorTest, PinnedMemoryRefusedIsSlowerNotWrong) {
  put_input();
  FakeAccelerator::set_options({.pinned_capacity_bytes = 0});
  Engine engine(options(80 << 10, EngineOptions::kAllWeights));
  Client client(engine, "model", groups());
  for (int pass = 0; pass < 3; ++pass) EXPECT_TRUE(right(enqueue(client)));
}

TEST_F(AcceleratorTest, ATruncatedFileIsAnErrorAndTheEngineLives) {
  put_input();
  Engine engine(options(80 << 10));
  Client client(engine, "model", groups());
  EXPECT_TRUE(right(enqueue(client)));
  fs::resize_file(folder_ / "model.safetensors", fs::file_size(folder_ / "model.safetensors") / 2);
  client.begin_pass();
  EXPECT_THROW(
      {
        for (size_t i = 0; i < kGroups; ++i) Lease lease = client.lease(i);
      },
      IoError);
  client.end_pass(false);
  engine.unload();
  for (const at::Tensor& slot : slots_) EXPECT_TRUE(weights::is_stub(slot));
}

TEST_F(AcceleratorTest, CancellationsLeaveTheEngineUsable) {
  put_input();
  FakeAccelerator::set_options({.random_delay_ms = 0.1});
  Engine engine(options(80 << 10));
  Client client(engine, "model", groups());
  std::mt19937 random(3);
  for (int i = 0; i < 200; ++i) {
    StopSource stop;
    engine.set_stop_token(stop.token());
    const size_t at = random() % (kGroups + 2);
    bool threw = false;
    at::Tensor x = on_device_;
    client.begin_pass();
    try {
      for (size_t group = 0; group < kGroups; ++group) {
        if (group == at) stop.request_stop();
        Lease lease = client.lease(group);
        x = at::linear(x, slots_[group]);
      }
      client.end_pass();
    } catch (const Cancelled&) {
      client.end_pass(false);
      threw = true;
    }
    EXPECT_EQ(threw, at < kGroups) << "round " << i;
    if (!threw) {
      EXPECT_TRUE(right(x)) << "round " << i;
    }
  }
  engine.set_stop_token({});
  EXPECT_TRUE(right(enqueue(client)));
  engine.unload();
  for (const at::Tensor& slot : slots_) EXPECT_TRUE(weights::is_stub(slot));
}

TEST_F(AcceleratorTest, UnloadGivesTheMemoryBack) {
  put_input();
  Engine engine(options(160 << 10, EngineOptions::kAllWeights));
  Client client(engine, "model", groups());
  FakeAccelerator::drain();
  const uint64_t before = FakeAccelerator::live_bytes();
  const uint64_t pinned = FakeAccelerator::pinned_bytes();
  for (int round = 0; round < 3; ++round) {
    EXPECT_TRUE(right(enqueue(client)));
    engine.unload();
    FakeAccelerator::drain();
    EXPECT_EQ(FakeAccelerator::live_bytes(), before);
    EXPECT_EQ(FakeAccelerator::pinned_bytes(), pinned);
  }
}

TEST_F(AcceleratorTest, ChangedWeightsAreKept) {
  put_input();
  Engine engine(options(80 << 10, EngineOptions::kAllWeights));
  Client client(engine, "model", groups());
  EXPECT_TRUE(right(enqueue(client)));
  {
    Lease lease = client.lease(3);
    slots_[3].mul_(2);
  }
  at::Tensor expected = input_;
  for (size_t i = 0; i < kGroups; ++i)
    expected = at::linear(expected, i == 3 ? weights_[i] * 2 : weights_[i]);
  for (int pass = 0; pass < 3; ++pass) EXPECT_TRUE(enqueue(client).to(at::kCPU).equal(expected));
}

TEST_F(AcceleratorTest, ATraceMayEndWhileCopiesAreUnderWay) {
  put_input();
  FakeAccelerator::set_options({.copy_delay_ms = 3});
  Trace trace;
  EngineOptions options = AcceleratorTest::options(160 << 10, EngineOptions::kAllWeights);
  options.trace = &trace;
  Engine engine(options);
  Client client(engine, "model", groups());
  at::Tensor first = enqueue(client);
  engine.set_trace(nullptr);
  EXPECT_TRUE(right(first));
  EXPECT_TRUE(right(enqueue(client)));
}

TEST_F(AcceleratorTest, AComponentThatComesLaterHasItsHomesInHostMemoryToo) {
  put_input();
  Engine engine(options(80 << 10, EngineOptions::kAllWeights));
  Client first(engine, "first", groups());
  for (int pass = 0; pass < 2; ++pass) EXPECT_TRUE(right(enqueue(first)));
  Client second(engine, "second", groups());
  for (int pass = 0; pass < 2; ++pass) EXPECT_TRUE(right(enqueue(second)));
  const uint64_t read = engine.report().bytes_read;
  for (int pass = 0; pass < 2; ++pass) EXPECT_TRUE(right(enqueue(second)));
  EXPECT_EQ(engine.report().bytes_read, read);
}

// The room of one pipeline is taken by another, whose stream knows nothing of the first one's work.
TEST_F(AcceleratorTest, WhatIsDroppedWaitsForTheStreamThatUsedIt) {
  put_input();
  FakeAccelerator::drain();
  FakeAccelerator::set_options({.op_delay_ms = 3});
  Engine engine(options(400 << 10));
  Client first(engine, "first", groups());
  std::vector<at::Tensor> of_first = slots_;
  Client second(engine, "second", groups());
  std::vector<at::Tensor> of_second = slots_;
  const c10::impl::VirtualGuardImpl guard(device_.type());
  const c10::Stream other = guard.getStreamFromGlobalPool(device_);
  for (int round = 0; round < 3; ++round) {
    at::Tensor a, b;
    {
      c10::StreamGuard on(other);
      slots_ = of_first;
      a = enqueue(first);
    }
    slots_ = of_second;
    b = enqueue(second);
    FakeAccelerator::drain();
    EXPECT_TRUE(right(a));
    EXPECT_TRUE(right(b));
  }
}

// ---- device memory that runs out ----

TEST_F(AcceleratorTest, AnArenaThatDoesNotFitIsMadeSmaller) {
  put_input();
  Engine engine(options(4 << 20, EngineOptions::kAllWeights));
  Client client(engine, "model", groups());
  FakeAccelerator::drain();
  FakeAccelerator::reset_peak();
  const uint64_t capacity = FakeAccelerator::live_bytes() + (200 << 10);
  FakeAccelerator::set_options({.capacity_bytes = capacity});
  for (int pass = 0; pass < 3; ++pass) EXPECT_TRUE(right(enqueue(client)));
  EXPECT_EQ(engine.report().shrinks, 1u);
  EXPECT_GT(client.plan().streamed_bytes, 0u);
  EXPECT_GT(client.plan().peak_bytes(), 140u << 10) << "no smaller than it must";
  EXPECT_LE(FakeAccelerator::peak_bytes(), capacity);
}

TEST_F(AcceleratorTest, NoRoomForAnyArenaIsAnErrorWithTheNumbers) {
  put_input();
  Engine engine(options(4 << 20));
  Client client(engine, "model", groups());
  FakeAccelerator::drain();
  FakeAccelerator::set_options({.capacity_bytes = FakeAccelerator::live_bytes() + (20 << 10)});
  try {
    enqueue(client);
    FAIL() << "found room";
  } catch (const DeviceError& error) {
    EXPECT_THAT(error.what(),
                ::testing::AllOf(::testing::HasSubstr("288 KiB asked for"),
                                 ::testing::HasSubstr("model: 288 KiB resident"),
                                 ::testing::HasSubstr("20.0 KiB of"),
                                 ::testing::HasSubstr("the least that would do is 36.0 KiB")));
  }
  // Once others have given theirs back, the plan is the one that was asked for.
  FakeAccelerator::set_options({});
  for (int pass = 0; pass < 2; ++pass) EXPECT_TRUE(right(enqueue(client)));
  EXPECT_EQ(client.plan().streamed_bytes, 0u);
}

TEST(OutOfMemory, WhatWasAskedForIsReadFromTheMessage) {
  EXPECT_EQ(asked_bytes("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"),
            2ull << 30);
  EXPECT_EQ(asked_bytes("Tried to allocate 20.50 MiB (GPU 0; 7.79 GiB total"), 41ull << 19);
  EXPECT_EQ(asked_bytes("out of memory. Tried to allocate 512 bytes; 1 of 2"), 512u);
  EXPECT_EQ(asked_bytes("Tried to allocate"), 0u);
  EXPECT_EQ(asked_bytes("Tried to allocate everything there is"), 0u);
  EXPECT_EQ(asked_bytes("something else"), 0u);
}

TEST_F(AcceleratorTest, ReservedMemoryIsLeftToTheApplication) {
  put_input();
  Engine engine(options(320 << 10, EngineOptions::kAllWeights));
  Client client(engine, "model", groups());
  EXPECT_TRUE(right(enqueue(client)));
  FakeAccelerator::drain();
  const uint64_t whole = FakeAccelerator::live_bytes();
  {
    Reservation reservation = engine.reserve(180 << 10);
    FakeAccelerator::drain();
    FakeAccelerator::reset_peak();
    for (int pass = 0; pass < 3; ++pass) EXPECT_TRUE(right(enqueue(client)));
    EXPECT_LE(FakeAccelerator::peak_bytes() + (140 << 10), whole + (16 << 10));
  }
  for (int pass = 0; pass < 2; ++pass) EXPECT_TRUE(right(enqueue(client)));
  EXPECT_EQ(client.plan().streamed_bytes, 0u);
}

// About as long a copy as an operation. In a ring of one group they take turns; in one of three
// they run side by side. A ratio within one run, and a loose one: bench/ measures.
TEST_F(AcceleratorTest, OverlapsCopiesWithCompute) {
  put_input();
  FakeAccelerator::set_options(
      {.host_to_device_bytes_per_second = kSide * kSide * 4 / 4e-3, .op_delay_ms = 4});
  auto seconds = [&](uint64_t budget) {
    Engine engine(options(budget, EngineOptions::kAllWeights));
    Client client(engine, "model", groups());
    enqueue(client);
    double least = 1e9;  // of three: other programs run too
    for (int round = 0; round < 3; ++round) {
      FakeAccelerator::drain();
      const auto began = std::chrono::steady_clock::now();
      for (int pass = 0; pass < 3; ++pass) enqueue(client);
      FakeAccelerator::drain();
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
      least = std::min(least, took.count());
    }
    return least;
  };
  const double in_turns = seconds(40 << 10);
  EXPECT_LT(seconds(120 << 10), 0.9 * in_turns);
}

}  // namespace
}  // namespace ferry::offload
