#include "ferry/offload/engine.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <numeric>
#include <optional>
#include <random>
#include <thread>

#include "../widening_encoding.h"
#include "ferry/base/error.h"
#include "ferry/base/units.h"
#include "ferry/io/safetensors.h"
#include "ferry/tensor/dtype.h"
#include "ferry/testing/faulty_system.h"
#include "ferry/weights/stub.h"

namespace ferry::offload {
namespace {

namespace fs = std::filesystem;

class EngineTest : public ::testing::Test {
 protected:
  EngineTest() {
    std::string name = ::testing::TempDir() + "/engine.XXXXXX";
    folder_ = ::mkdtemp(name.data());
  }
  ~EngineTest() override { fs::remove_all(folder_); }

  // One weight and one bias a group, with random values; the file keeps its own order.
  void write(const std::vector<int64_t>& rows, at::ScalarType dtype = at::kFloat) {
    at::manual_seed(1);
    for (int64_t count : rows) {
      // Values that bfloat16 holds too, for write_pack().
      for (const auto& shape : {std::vector<int64_t>{count, 64}, std::vector<int64_t>{count}})
        expected_.push_back(at::randn(shape).to(at::kBFloat16).to(dtype));
    }
    write_expected("model.safetensors", dtype);
  }

  void write_expected(const std::string& file, at::ScalarType dtype) {
    std::vector<io::SafetensorsWriter::Entry> entries;
    std::vector<at::Tensor> values;
    for (size_t i = 0; i < expected_.size(); ++i) {
      entries.push_back({(i % 2 == 0 ? "w" : "b") + std::to_string(i / 2),
                         tensor::from_torch(dtype), expected_[i].sizes().vec()});
      values.push_back(expected_[i].to(dtype));
    }
    io::SafetensorsWriter writer(folder_ / file, entries);
    for (const at::Tensor& value : values) {
      writer.write({static_cast<const std::byte*>(value.const_data_ptr()),
                    static_cast<size_t>(value.nbytes())});
    }
    writer.finish();
  }

  std::vector<Group> groups(at::ScalarType wanted = at::kFloat) {
    auto checkpoint = weights::Checkpoint::open_file(folder_ / "model.safetensors");
    std::vector<Group> groups;
    slots_.clear();
    for (size_t i = 0; i < expected_.size() / 2; ++i) {
      Group group{"g" + std::to_string(i), {}, false};
      for (const char* kind : {"w", "b"}) {
        const weights::StoredTensor* stored = checkpoint->find(kind + std::to_string(i));
        weights::Slot slot{{stored->key}, weights::make_stub(stored->shape, wanted)};
        slots_.push_back(slot.tensor);
        group.slots.push_back({slot, *stored});
      }
      groups.push_back(std::move(group));
    }
    return groups;
  }

  // The same with each weight also in a pack of half the size that takes `decode_time` to decode.
  std::vector<Group> groups_with_packs(std::chrono::milliseconds decode_time) {
    write_expected("packed.safetensors", at::kBFloat16);
    auto pack = weights::Checkpoint::open_file(folder_ / "packed.safetensors");
    std::vector<Group> groups = EngineTest::groups();
    for (Group& group : groups) {
      for (weights::BoundSlot& bound : group.slots)
        bound.packed = widened(*pack->find(bound.source.key), false, decode_time);
    }
    return groups;
  }

  bool is_right(size_t group, at::ScalarType dtype = at::kFloat) const {
    return slots_[2 * group].equal(expected_[2 * group].to(dtype)) &&
           slots_[2 * group + 1].equal(expected_[2 * group + 1].to(dtype));
  }

  void run_pass(Client& client, const std::vector<size_t>& order,
                at::ScalarType dtype = at::kFloat) {
    client.begin_pass();
    for (size_t group : order) {
      Lease lease = client.lease(group);
      ASSERT_TRUE(is_right(group, dtype)) << "group " << group;
    }
    client.end_pass();
  }

  void expect_all_stubs() const {
    for (const at::Tensor& slot : slots_) EXPECT_TRUE(weights::is_stub(slot));
  }

  static EngineOptions options(uint64_t budget, uint64_t arena = 128 << 10) {
    EngineOptions options;
    options.weights_memory_bytes = budget;
    options.preferred_arena_bytes = arena;
    options.small_slot_bytes = 0;
    return options;
  }

  fs::path folder_;
  std::vector<at::Tensor> expected_;
  std::vector<at::Tensor> slots_;
};

const std::vector<size_t> kInOrder = {0, 1, 2, 3, 4, 5, 6, 7};

TEST_F(EngineTest, StreamsEveryGroupOfEveryPass) {
  write({100, 30, 200, 7, 150, 64, 90, 120});
  for (auto backend : {io::ReadBackend::automatic, io::ReadBackend::pread}) {
    EngineOptions options = EngineTest::options(160 << 10);
    options.read.backend = backend;
    Engine engine(options);
    Client client(engine, "model", groups());
    for (int pass = 0; pass < 4; ++pass) run_pass(client, kInOrder);
    Report report = engine.report();
    EXPECT_EQ(report.leases, 32u);
    EXPECT_EQ(report.misses, 0u)
        << "the registration order was right, so nothing had to be asked for";
    EXPECT_LE(report.peak_bytes, 160u << 10);
    EXPECT_GT(client.plan().streamed_bytes, 0u);
  }
}

TEST_F(EngineTest, SlotsAreStubsOutsideLeases) {
  write({100, 100, 100, 100});
  Engine engine(options(64 << 10, 64 << 10));
  Client client(engine, "model", groups());
  expect_all_stubs();
  client.begin_pass();
  {
    Lease lease = client.lease(1);
    EXPECT_TRUE(is_right(1));
    EXPECT_TRUE(weights::is_stub(slots_[0]));
  }
  EXPECT_TRUE(weights::is_stub(slots_[2]));
  EXPECT_TRUE(at::isnan(slots_[2]).all().item<bool>());
  client.end_pass();
}

TEST_F(EngineTest, KeepsTensorIdentity) {
  write({100, 100});
  Engine engine(options(40 << 10, 40 << 10));
  Client client(engine, "model", groups());
  const c10::TensorImpl* before = slots_[0].unsafeGetTensorImpl();
  run_pass(client, {0, 1});
  EXPECT_EQ(slots_[0].unsafeGetTensorImpl(), before);
}

TEST_F(EngineTest, AnotherOrderIsSlowerNeverWrong) {
  write({100, 30, 200, 7, 150, 64, 90, 120});
  std::mt19937 random(5);
  Engine engine(options(150 << 10));
  Client client(engine, "model", groups());
  for (int pass = 0; pass < 200; ++pass) {
    std::vector<size_t> order;  // some groups twice, some never
    for (size_t i = 0; i < 1 + random() % 12; ++i) order.push_back(random() % 8);
    for (int repeat = 0; repeat < 2; ++repeat) run_pass(client, order);
  }
  EXPECT_GT(engine.report().misses, 0u);
}

TEST_F(EngineTest, TheRecordedOrderIsReadAhead) {
  write({100, 100, 100, 100, 100, 100, 100, 100});
  Engine engine(options(150 << 10));
  Client client(engine, "model", groups());
  const std::vector<size_t> order = {7, 2, 5, 0, 1, 6, 3, 4};
  run_pass(client, order);
  uint64_t misses = engine.report().misses;
  for (int pass = 0; pass < 3; ++pass) run_pass(client, order);
  EXPECT_EQ(engine.report().misses, misses);
}

TEST_F(EngineTest, APassThatDoesNotWrapAroundIsReadAheadEachTime) {
  write({100, 100, 100, 100, 100, 100, 100, 100});
  Engine engine(options(80 << 10, 80 << 10));
  ClientOptions options;
  options.wrap_around = false;
  Client client(engine, "model", groups(), options);
  for (int pass = 0; pass < 3; ++pass) run_pass(client, kInOrder);
  EXPECT_EQ(engine.report().misses, 0u);
}

TEST_F(EngineTest, ReadsEachStreamedByteOnceAStep) {
  write({100, 100, 100, 100, 100, 100, 100, 100});
  Engine engine(options(80 << 10, 80 << 10));
  Client client(engine, "model", groups());
  run_pass(client, kInOrder);
  run_pass(client, kInOrder);
  uint64_t before = engine.report().bytes_read;
  for (int pass = 0; pass < 10; ++pass) run_pass(client, kInOrder);
  uint64_t per_pass = (engine.report().bytes_read - before) / 10;
  // and at most a page more at both ends of each group
  uint64_t streamed = 0;
  for (size_t i = 0; i < 8; ++i) {
    if (client.plan().placements[i] == Placement::streamed)
      streamed += expected_[2 * i].nbytes() + expected_[2 * i + 1].nbytes();
  }
  EXPECT_GE(per_pass, streamed);
  EXPECT_LE(per_pass, streamed + 8 * 2 * 4096);
}

TEST_F(EngineTest, CastsToTheWantedDtype) {
  write({100, 30, 200, 7});
  for (uint64_t budget : {uint64_t{100} << 10, uint64_t{10} << 20}) {
    Engine engine(options(budget));
    Client client(engine, "model", groups(at::kBFloat16));
    for (int pass = 0; pass < 3; ++pass) run_pass(client, {0, 1, 2, 3}, at::kBFloat16);
  }
}

TEST_F(EngineTest, EncodedTensorsAreDecodedAndCast) {
  write({100, 30, 200, 7}, at::kBFloat16);
  for (uint64_t budget : {uint64_t{120} << 10, uint64_t{10} << 20}) {
    for (at::ScalarType wanted : {at::kFloat, at::kBFloat16}) {
      std::vector<Group> encoded = groups(wanted);
      for (Group& group : encoded) {
        for (weights::BoundSlot& bound : group.slots) bound.source = widened(bound.source);
      }
      Engine engine(options(budget));
      Client client(engine, "model", std::move(encoded));
      for (int pass = 0; pass < 3; ++pass) run_pass(client, {0, 1, 2, 3}, wanted);
      EXPECT_LE(engine.report().peak_bytes, budget);
    }
  }
}

TEST_F(EngineTest, ADamagedEncodingIsAnErrorAndTheEngineLives) {
  write({100, 100, 100, 100}, at::kBFloat16);
  std::vector<Group> encoded = groups();
  for (size_t i = 0; i < encoded.size(); ++i) {
    for (weights::BoundSlot& bound : encoded[i].slots)
      bound.source = widened(bound.source, /*damaged=*/i == 2);
  }
  Engine engine(options(90 << 10, 90 << 10));
  Client client(engine, "model", std::move(encoded));
  for (int i = 0; i < 2; ++i) {
    client.begin_pass();
    for (size_t group : {0, 1, 3}) {
      Lease lease = client.lease(group);
      EXPECT_TRUE(is_right(group));
    }
    EXPECT_THROW(Lease lease = client.lease(2), FormatError);
    client.end_pass(false);
  }
  client.unload();
  expect_all_stubs();
}

TEST_F(EngineTest, MisalignedDataIsCopied) {
  // A header of odd length puts every tensor off its item size.
  const std::string header =
      R"({"w0":{"dtype":"F32","shape":[50,64],"data_offsets":[0,12800]},"b0":{"dtype":"F32","shape":[50],"data_offsets":[12800,13000]}})";
  std::string padded = header;
  while (padded.size() % 4 != 1) padded += ' ';
  at::Tensor w = at::randn({50, 64}), b = at::randn({50});
  std::ofstream out(folder_ / "model.safetensors", std::ios::binary);
  uint64_t length = padded.size();
  out.write(reinterpret_cast<const char*>(&length), 8);
  out << padded;
  out.write(static_cast<const char*>(w.const_data_ptr()), 12800);
  out.write(static_cast<const char*>(b.const_data_ptr()), 200);
  out.close();
  expected_ = {w, b};
  Engine engine(options(40 << 10, 40 << 10));
  Client client(engine, "model", groups());
  for (int pass = 0; pass < 2; ++pass) run_pass(client, {0});
}

TEST_F(EngineTest, NestedLeasesOfOneGroup) {
  write({100, 100});
  Engine engine(options(40 << 10, 40 << 10));
  Client client(engine, "model", groups());
  client.begin_pass();
  Lease outer = client.lease(0);
  {
    Lease inner = client.lease(0);
    EXPECT_TRUE(is_right(0));
  }
  EXPECT_TRUE(is_right(0));
  outer.release();
  EXPECT_TRUE(weights::is_stub(slots_[0]));
  client.end_pass();
}

TEST_F(EngineTest, MoreLeasedThanFitsSaysWhat) {
  write({100, 100, 100, 100});
  Engine engine(options(40 << 10, 40 << 10));
  Client client(engine, "model", groups());
  client.begin_pass();
  Lease first = client.lease(0);
  try {
    Lease second = client.lease(1);
    FAIL() << "both fit";
  } catch (const BudgetError& error) {
    EXPECT_THAT(error.what(),
                ::testing::AllOf(::testing::HasSubstr("g1"), ::testing::HasSubstr("g0")));
  }
  first.release();
  client.end_pass(false);
  run_pass(client, {0, 1, 2, 3});
}

TEST_F(EngineTest, ABudgetThatCannotWorkStatesTheLeast) {
  write({100, 400});
  Engine engine(options(50 << 10));
  try {
    Client client(engine, "model", groups());
    FAIL() << "accepted";
  } catch (const BudgetError& error) {
    EXPECT_THAT(error.what(), ::testing::HasSubstr("give at least"));
  }
}

// What /proc/self/status says, in bytes; 0 where it does not.
uint64_t process_memory(const std::string& field) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(field + ":")) return std::stoull(line.substr(field.size() + 1)) << 10;
  }
  return 0;
}

// A group that stays is read through the ring where it is converted.
TEST_F(EngineTest, TheLeastBudgetServesAGroupThatStaysAndIsCast) {
  write({400, 10, 10});
  uint64_t served = 0;
  for (uint64_t budget = 4 << 10; served < 8; budget += 4 << 10) {
    Engine engine(options(budget));
    std::vector<Group> groups = EngineTest::groups(at::kDouble);
    groups[0].keep_resident = true;
    std::optional<Client> client;
    try {
      client.emplace(engine, "model", std::move(groups));
    } catch (const BudgetError&) {
      continue;
    }
    ++served;
    client->begin_pass();
    Lease outer = client->lease(0);
    for (size_t group : {1, 2}) {
      Lease lease = client->lease(group);
      EXPECT_TRUE(is_right(group, at::kDouble));
    }
    EXPECT_TRUE(is_right(0, at::kDouble));
    outer.release();
    client->end_pass();
    EXPECT_LE(engine.report().peak_bytes, budget);
  }
}

TEST_F(EngineTest, TheProcessGrowsByNoMoreThanThePlan) {
  write(std::vector<int64_t>(16, 16384));  // 4 MiB each
  std::vector<size_t> order(16);
  std::iota(order.begin(), order.end(), 0);
  constexpr uint64_t kAll = 68ull << 20;
  constexpr uint64_t kLeast = 5ull << 20;
  {  // what the first run leaves behind is none of the plan's
    Engine engine(options(kLeast));
    Client client(engine, "model", groups());
    run_pass(client, order);
  }
  for (uint64_t i = 0; i < 20; ++i) {
    const uint64_t budget = kLeast + i * (kAll - kLeast) / 19;
    std::ofstream("/proc/self/clear_refs") << "5";  // the peak starts anew
    const uint64_t before = process_memory("VmRSS");
    if (before == 0 || process_memory("VmHWM") > before + (4 << 20))
      GTEST_SKIP() << "the peak of this process cannot be measured here";
    Engine engine(options(budget));
    Client client(engine, "model", groups());
    for (int pass = 0; pass < 2; ++pass) run_pass(client, order);
    const uint64_t slack = std::max<uint64_t>(budget / 20, 16 << 20);
    EXPECT_LE(process_memory("VmHWM"), before + client.plan().peak_bytes() + slack)
        << "under " << budget;
    EXPECT_LE(client.plan().peak_bytes(), budget);
  }
}

TEST_F(EngineTest, TruncatedFileIsAnErrorAndTheEngineLives) {
  write({100, 100, 100, 100});
  Engine engine(options(40 << 10, 40 << 10));
  Client client(engine, "model", groups());
  run_pass(client, {0, 1, 2, 3});
  const auto size = fs::file_size(folder_ / "model.safetensors");
  fs::resize_file(folder_ / "model.safetensors", size / 2);
  client.begin_pass();
  EXPECT_THROW(
      {
        for (size_t group : {0, 1, 2, 3}) Lease lease = client.lease(group);
      },
      IoError);
  client.end_pass(false);
  client.unload();
  expect_all_stubs();
}

TEST_F(EngineTest, AFileReplacedByRenameFinishesWithTheOld) {
  write({100, 100, 100, 100});
  Engine engine(options(40 << 10, 40 << 10));
  Client client(engine, "model", groups());
  run_pass(client, {0, 1, 2, 3});
  std::ofstream(folder_ / "other") << "something else";
  fs::rename(folder_ / "other", folder_ / "model.safetensors");
  run_pass(client, {0, 1, 2, 3});
}

TEST_F(EngineTest, AThousandCancellationsLeaveTheEngineUsable) {
  write({100, 30, 200, 7, 150, 64, 90, 120});
  Engine engine(options(150 << 10));
  Client client(engine, "model", groups());
  std::mt19937 random(11);
  int cancelled = 0;
  for (int i = 0; i < 1000; ++i) {
    StopSource stop;
    engine.set_stop_token(stop.token());
    // Before a group, or by another thread at any moment: that one may come too late.
    const size_t at = random() % 12;
    std::thread other;
    if (at >= kInOrder.size()) {
      other = std::thread([&stop, us = random() % 500] {
        std::this_thread::sleep_for(std::chrono::microseconds(us));
        stop.request_stop();
      });
    }
    bool threw = false;
    client.begin_pass();
    try {
      for (size_t group : kInOrder) {
        if (group == at) stop.request_stop();
        Lease lease = client.lease(group);
        EXPECT_TRUE(is_right(group)) << "round " << i;
      }
      client.end_pass();
    } catch (const Cancelled&) {
      client.end_pass(false);
      threw = true;
    }
    if (other.joinable()) other.join();
    EXPECT_TRUE(threw || at >= kInOrder.size()) << "round " << i;
    cancelled += threw;
    if (i % 100 == 0) {
      client.unload();
      expect_all_stubs();
    }
  }
  EXPECT_GT(cancelled, 600);
  EXPECT_LT(cancelled, 1000) << "no run came to its end";
  engine.set_stop_token({});
  run_pass(client, kInOrder);
  client.unload();
  expect_all_stubs();
}

TEST_F(EngineTest, TwoComponentsShareTheBudget) {
  write({100, 100, 100, 100, 100, 100, 100, 100});
  Engine engine(options(120 << 10, 60 << 10));
  std::vector<Group> first = groups();
  std::vector<at::Tensor> first_slots = slots_;
  std::vector<Group> second = groups();
  std::vector<at::Tensor> second_slots = slots_;
  Client a(engine, "a", std::move(first));
  Client b(engine, "b", std::move(second));
  for (int round = 0; round < 3; ++round) {
    slots_ = first_slots;
    run_pass(a, kInOrder);
    slots_ = second_slots;
    run_pass(b, kInOrder);
  }
  EXPECT_LE(engine.report().peak_bytes, 120u << 10);
  engine.unload();
  slots_ = first_slots;
  expect_all_stubs();
}

TEST_F(EngineTest, WhatAnotherComponentHoldsDoesNotSplitTheRoom) {
  write({90, 75, 232, 232});
  for (uint64_t budget = 40 << 10; budget < 240 << 10; budget += 4 << 10) {
    Engine engine(options(budget));
    std::vector<Group> all = groups();
    all[1].keep_resident = true;
    std::optional<Client> first, second;
    try {
      first.emplace(engine, "first", std::vector<Group>{all[0]});
      second.emplace(engine, "second", std::vector<Group>{all[1], all[2], all[3]});
    } catch (const BudgetError&) {
      continue;
    }
    for (int round = 0; round < 3; ++round) {
      run_pass(*first, {0});
      second->begin_pass();
      Lease outer = second->lease(0);
      EXPECT_TRUE(is_right(1));
      for (size_t group : {1, 2}) {
        Lease lease = second->lease(group);
        EXPECT_TRUE(is_right(group + 1)) << format_bytes(budget);
      }
      outer.release();
      second->end_pass();
    }
    EXPECT_LE(engine.report().peak_bytes, budget);
  }
}

TEST_F(EngineTest, WhatFitsTogetherIsReadOnce) {
  write({100, 100, 100, 100});
  Engine engine(options(1 << 20));
  std::vector<Group> first = groups();
  std::vector<at::Tensor> first_slots = slots_;
  Client a(engine, "a", std::move(first));
  Client b(engine, "b", groups());
  std::vector<at::Tensor> second_slots = slots_;
  uint64_t after_first = 0;
  for (int round = 0; round < 3; ++round) {
    slots_ = first_slots;
    run_pass(a, {0, 1, 2, 3});
    slots_ = second_slots;
    run_pass(b, {0, 1, 2, 3});
    if (round == 0) after_first = engine.report().bytes_read;
  }
  EXPECT_EQ(engine.report().bytes_read, after_first);
}

TEST_F(EngineTest, TheNextComponentIsBroughtWhileThisOneEnds) {
  write({100, 100, 100, 100});
  Engine engine(options(120 << 10, 120 << 10));
  std::vector<Group> first = groups();
  std::vector<at::Tensor> first_slots = slots_;
  Client a(engine, "a", std::move(first));
  Client b(engine, "b", groups());
  std::vector<at::Tensor> second_slots = slots_;
  engine.announce({{&a, 2}, {&b, 1}});
  slots_ = first_slots;
  for (int pass = 0; pass < 2; ++pass) run_pass(a, {0, 1, 2, 3});
  slots_ = second_slots;
  uint64_t misses = engine.report().misses;
  run_pass(b, {0, 1, 2, 3});
  EXPECT_EQ(engine.report().misses, misses);
  EXPECT_LE(engine.report().peak_bytes, 120u << 10);
}

TEST_F(EngineTest, ChangedWeightsAreKept) {
  write({100, 100, 100, 100});
  for (uint64_t budget : {uint64_t{60} << 10, uint64_t{1} << 20}) {
    Engine engine(options(budget, 40 << 10));
    std::vector<std::string> told;
    ClientOptions options;
    options.source_changed = [&](const at::Tensor&, const weights::StoredTensor& source) {
      told.push_back(source.key);
    };
    Client client(engine, "model", groups(), options);
    const auto original = expected_;
    run_pass(client, {0, 1, 2, 3});
    {
      Lease lease = client.lease(1);
      slots_[2].add_(1);
    }
    expected_[2] = expected_[2] + 1;
    EXPECT_THAT(told, ::testing::UnorderedElementsAre("w1", "b1"));
    for (int pass = 0; pass < 3; ++pass) run_pass(client, {0, 1, 2, 3});
    // Replaced while idle, as load_state_dict() does.
    client.unload();
    expected_[4] = at::randn_like(expected_[4]);
    slots_[4].set_data(expected_[4].clone());
    for (int pass = 0; pass < 2; ++pass) run_pass(client, {0, 1, 2, 3});
    EXPECT_EQ(engine.report().changed, 2u);
    expected_ = original;
  }
}

TEST_F(EngineTest, AChangeThatCannotBeSavedStaysInMemory) {
  write({100, 100, 100, 100});
  const std::string before = std::getenv("FERRY_CACHE_DIR") ? std::getenv("FERRY_CACHE_DIR") : "";
  for (uint64_t budget : {uint64_t{60} << 10, uint64_t{1} << 20}) {
    Engine engine(options(budget, 40 << 10));
    Client client(engine, "model", groups());
    const auto original = expected_;
    run_pass(client, {0, 1, 2, 3});
    ::setenv("FERRY_CACHE_DIR", (folder_ / "model.safetensors" / "no folder").c_str(), 1);
    {
      Lease lease = client.lease(1);
      slots_[2].add_(1);
    }
    expected_[2] = expected_[2] + 1;
    EXPECT_TRUE(is_right(1));
    client.unload();
    EXPECT_THROW(client.lease(1), IoError);
    EXPECT_TRUE(is_right(1));
    run_pass(client, {0, 2, 3});
    ::setenv("FERRY_CACHE_DIR", before.c_str(), 1);
    for (int pass = 0; pass < 2; ++pass) run_pass(client, {0, 1, 2, 3});
    EXPECT_EQ(engine.report().changed, 1u);
    expected_ = original;
  }
}

TEST_F(EngineTest, PassesInLockstepReadEachGroupOnce) {
  write({100, 100, 100, 100, 100, 100, 100, 100});
  constexpr uint64_t kArena = 80 << 10;
  EngineOptions fixed = options(kArena, kArena);
  fixed.replan = false;  // a plan by measured times streams more or less than the one before it
  Engine engine(fixed);
  Client client(engine, "model", groups());
  run_pass(client, kInOrder);
  run_pass(client, kInOrder);
  // What was read ahead at the beginning and at the end, an arena at most, tells on neither.
  constexpr int kPasses = 25;
  auto bytes_of_passes = [&](const std::function<void()>& pass) {
    const uint64_t before = engine.report().bytes_read;
    for (int i = 0; i < kPasses; ++i) pass();
    return engine.report().bytes_read - before;
  };
  const uint64_t alone = bytes_of_passes([&] { run_pass(client, kInOrder); });
  const uint64_t together = bytes_of_passes([&] {
    client.begin_lockstep(2);
    client.begin_pass();
    for (size_t group : kInOrder) {
      for (bool following : {false, true, true}) {
        client.follow(following);
        Lease lease = client.lease(group);
        ASSERT_TRUE(is_right(group));
      }
    }
    client.end_pass();
    client.end_lockstep();
  });
  EXPECT_LE(together, alone + kArena);
  EXPECT_LE(alone, kPasses * (client.plan().streamed_bytes + 8 * 2 * 4096) + kArena);
}

TEST_F(EngineTest, TwoThreadsTakeTurns) {
  write({100, 30, 200, 7, 150, 64, 90, 120});
  Engine engine(options(160 << 10));
  std::vector<Group> first = groups();
  std::vector<at::Tensor> first_slots = slots_;
  Client a(engine, "a", std::move(first));
  Client b(engine, "b", groups());
  const std::vector<at::Tensor> second_slots = slots_;
  auto work = [&](Client& client, const std::vector<at::Tensor>& slots, int& wrong) {
    for (int pass = 0; pass < 20; ++pass) {
      client.begin_pass();
      for (size_t group : kInOrder) {
        Lease lease = client.lease(group);
        if (!slots[2 * group].equal(expected_[2 * group])) ++wrong;
      }
      client.end_pass();
    }
  };
  int wrong_a = 0, wrong_b = 0;
  std::thread other([&] { work(b, second_slots, wrong_b); });
  work(a, first_slots, wrong_a);
  other.join();
  EXPECT_EQ(wrong_a, 0);
  EXPECT_EQ(wrong_b, 0);
  EXPECT_LE(engine.report().peak_bytes, 160u << 10);
}

TEST_F(EngineTest, AReservationTakesFromTheWeights) {
  write({100, 100, 100, 100, 100, 100, 100, 100});
  Engine engine(options(256 << 10, 64 << 10));
  Client client(engine, "model", groups());
  run_pass(client, kInOrder);
  const uint64_t resident = client.plan().resident_bytes;
  {
    Reservation reservation = engine.reserve(100 << 10);
    EXPECT_EQ(reservation.bytes(), 100u << 10);
    for (int pass = 0; pass < 3; ++pass) run_pass(client, kInOrder);
    EXPECT_LE(client.plan().peak_bytes(), 156u << 10);
    EXPECT_LT(client.plan().resident_bytes, resident);
    EXPECT_LE(engine.report().resident_bytes + engine.report().arena_bytes, 156u << 10);
    Reservation moved = std::move(reservation);
    reservation.release();  // nothing: it is the other's now
    run_pass(client, kInOrder);
    EXPECT_LE(client.plan().peak_bytes(), 156u << 10);
  }
  for (int pass = 0; pass < 2; ++pass) run_pass(client, kInOrder);
  EXPECT_EQ(client.plan().resident_bytes, resident) << "given back";
}

TEST_F(EngineTest, AReservationWithinAPassCountsFromTheNextOne) {
  write({100, 100, 100, 100, 100, 100, 100, 100});
  Engine engine(options(256 << 10, 64 << 10));
  Client client(engine, "model", groups());
  Reservation reservation;
  client.begin_pass();
  for (size_t group : kInOrder) {
    Lease lease = client.lease(group);
    EXPECT_TRUE(is_right(group));
    if (group == 3) reservation = engine.reserve(100 << 10);
  }
  EXPECT_GT(client.plan().peak_bytes(), 156u << 10);
  client.end_pass();
  run_pass(client, kInOrder);
  EXPECT_LE(client.plan().peak_bytes(), 156u << 10);
}

TEST_F(EngineTest, AReservationThatEndedCountsNoLonger) {
  write({100, 100, 100, 100, 100, 100, 100, 100});
  Engine engine(options(1 << 20, 64 << 10));
  Client client(engine, "model", groups());
  run_pass(client, kInOrder);
  { Reservation reservation = engine.reserve(500 << 10); }
  engine.set_weights_memory(120 << 10);
  EXPECT_THROW(engine.set_weights_memory(8 << 10), BudgetError);
  for (size_t group : kInOrder) {
    Lease lease = client.lease(group);
    EXPECT_TRUE(is_right(group));
  }
  EXPECT_LE(client.plan().peak_bytes(), 120u << 10);
}

TEST_F(EngineTest, AReservationOfTooMuchSaysHowMuchThereIs) {
  write({100, 100, 100, 100});
  Engine engine(options(100 << 10, 64 << 10));
  Client client(engine, "model", groups());
  Reservation some = engine.reserve(20 << 10);
  std::string told;
  try {
    Reservation more = engine.reserve(70 << 10);
    FAIL() << "reserved";
  } catch (const BudgetError& error) {
    told = error.what();
  }
  EXPECT_THAT(told,
              ::testing::AllOf(::testing::HasSubstr("70.0 KiB of a weights budget of 100 KiB"),
                               ::testing::HasSubstr("20.0 KiB are reserved already"),
                               ::testing::HasSubstr("weights need at least 32.0 KiB"),
                               ::testing::HasSubstr("at most 48.0 KiB")));
  Reservation rest = engine.reserve(48 << 10);
  run_pass(client, {0, 1, 2, 3});
  EXPECT_THROW(engine.set_weights_memory(60 << 10), BudgetError);
  run_pass(client, {0, 1, 2, 3});
  Engine without(EngineTest::options(0));
  EXPECT_THROW(Reservation none = without.reserve(1), ArgumentError);
}

TEST_F(EngineTest, PiecesFillWhatOneGroupLeaves) {
  // The arena holds one group and a half: half of the next one is brought while one is leased.
  std::vector<io::SafetensorsWriter::Entry> entries;
  at::manual_seed(2);
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j)
      entries.push_back({fmt::format("w{}.{}", i, j), io::Dtype::F32, {64, 64}});
  }
  io::SafetensorsWriter writer(folder_ / "model.safetensors", entries);
  std::vector<at::Tensor> values;
  for (size_t i = 0; i < entries.size(); ++i) {
    values.push_back(at::randn({64, 64}));
    writer.write({static_cast<const std::byte*>(values.back().const_data_ptr()), 16384});
  }
  writer.finish();
  auto checkpoint = weights::Checkpoint::open_file(folder_ / "model.safetensors");
  std::vector<Group> groups;
  for (int i = 0; i < 4; ++i) {
    Group group{fmt::format("g{}", i), {}, false};
    for (int j = 0; j < 4; ++j) {
      const weights::StoredTensor* stored = checkpoint->find(fmt::format("w{}.{}", i, j));
      weights::Slot slot{{stored->key}, weights::make_stub(stored->shape, at::kFloat)};
      slots_.push_back(slot.tensor);
      group.slots.push_back({slot, *stored});
    }
    groups.push_back(std::move(group));
  }
  EngineOptions options = EngineTest::options(130 << 10, 130 << 10);
  options.piece_bytes = 16 << 10;
  Engine engine(options);
  Client client(engine, "model", std::move(groups));
  for (int pass = 0; pass < 3; ++pass) {
    client.begin_pass();
    for (size_t group = 0; group < 4; ++group) {
      Lease lease = client.lease(group);
      for (size_t j = 0; j < 4; ++j)
        ASSERT_TRUE(slots_[4 * group + j].equal(values[4 * group + j]));
    }
    client.end_pass();
  }
  EXPECT_EQ(engine.report().misses, 0u);
  EXPECT_LE(engine.report().peak_bytes, 130u << 10);
}

TEST_F(EngineTest, WithoutReadAheadEveryLeaseIsAMiss) {
  write({100, 100, 100, 100});
  EngineOptions options = EngineTest::options(40 << 10, 40 << 10);
  options.read_ahead = false;
  Engine engine(options);
  Client client(engine, "model", groups());
  for (int pass = 0; pass < 2; ++pass) run_pass(client, {0, 1, 2, 3});
  EXPECT_EQ(engine.report().misses, 8u);
}

TEST_F(EngineTest, AStepThatWaitsForTheDiskReadsThePack) {
  write({100, 100, 100, 100, 100, 100, 100, 100});
  EngineOptions options = EngineTest::options(130 << 10, 64 << 10);
  options.read.rate_limit_bytes_per_s = 4 << 20;
  Engine engine(options);
  Client client(engine, "model", groups_with_packs(std::chrono::milliseconds(0)));
  for (int pass = 0; pass < 6; ++pass) run_pass(client, kInOrder);
  EXPECT_TRUE(engine.report().reads_packs);
  EXPECT_LE(engine.report().peak_bytes, 130u << 10);
  const uint64_t before = engine.report().bytes_read;
  run_pass(client, kInOrder);
  EXPECT_LT(engine.report().bytes_read - before, 0.7 * client.plan().streamed_bytes);
}

TEST_F(EngineTest, WhereDecodingIsTheSlowerPartTheCheckpointIsRead) {
  write({100, 100, 100, 100, 100, 100, 100, 100});
  Engine engine(EngineTest::options(130 << 10, 64 << 10));
  Client client(engine, "model", groups_with_packs(std::chrono::milliseconds(10)));
  for (int pass = 0; pass < 6; ++pass) run_pass(client, kInOrder);
  EXPECT_FALSE(engine.report().reads_packs);
  EXPECT_EQ(engine.report().misses, 0u);
  EXPECT_LE(engine.report().peak_bytes, 130u << 10);
  client.unload();
  expect_all_stubs();
}

TEST_F(EngineTest, ABudgetTooSmallForDecodingReadsTheCheckpoint) {
  write({100, 100, 100, 100});
  // One group at a time fits as it lies in the checkpoint, not beside what it is decoded from.
  Engine engine(EngineTest::options(32 << 10, 0));
  Client client(engine, "model", groups_with_packs(std::chrono::milliseconds(0)));
  for (int pass = 0; pass < 2; ++pass) run_pass(client, {0, 1, 2, 3});
  EXPECT_FALSE(engine.report().reads_packs);
  EXPECT_LE(engine.report().peak_bytes, 32u << 10);
}

TEST_F(EngineTest, AChangedWeightIsReadFromWhereItIsKeptNotFromThePack) {
  write({100, 100, 100, 100});
  Engine engine(EngineTest::options(130 << 10, 40 << 10));
  Client client(engine, "model", groups_with_packs(std::chrono::milliseconds(0)));
  run_pass(client, {0, 1, 2, 3});
  {
    Lease lease = client.lease(1);
    slots_[2].mul_(2);
    expected_[2] = expected_[2] * 2;
  }
  for (int pass = 0; pass < 4; ++pass) run_pass(client, {0, 1, 2, 3});
  EXPECT_EQ(engine.report().changed, 1u);
}

using std::chrono_literals::operator""ms;

// A model whose reads may take longer than its compute.
class MeasuredTimes : public EngineTest {
 protected:
  MeasuredTimes() {
    write({100, 100, 100, 100, 100, 100, 100, 100});
    start(options(64 << 10));
  }
  ~MeasuredTimes() override {
    EXPECT_LE(engine_->report().peak_bytes, 130u << 10);
    client_->unload();
    expect_all_stubs();
  }

  static EngineOptions options(uint64_t arena) {
    EngineOptions options = EngineTest::options(130 << 10, arena);
    options.read.rate_limit_bytes_per_s = 8 << 20;  // so that leases wait, and the rate is known
    return options;
  }

  void start(const EngineOptions& options) {
    client_.reset();
    engine_.emplace(options);
    client_.emplace(*engine_, "model", groups());
  }

  // Groups [begin, end) compute for so long.
  void run(int passes, size_t begin, size_t end, std::chrono::milliseconds each) {
    for (int pass = 0; pass < passes; ++pass) {
      client_->begin_pass();
      for (size_t group : kInOrder) {
        Lease lease = client_->lease(group);
        ASSERT_TRUE(is_right(group));
        if (begin <= group && group < end) std::this_thread::sleep_for(each);
      }
      client_->end_pass();
    }
  }

  // Where reads are slow and nothing computes.
  uint64_t arena_planned_by_time(uint64_t preferred, uint64_t window) {
    EngineOptions options = MeasuredTimes::options(preferred);
    options.read.window_bytes = window;
    start(options);
    run(6, 0, 0, 0ms);
    EXPECT_GT(client_->plan().prediction.step_s, 0) << "the plan knows times";
    return client_->plan().arena_bytes;
  }

  std::optional<Engine> engine_;
  std::optional<Client> client_;
};

TEST_F(MeasuredTimes, PlanningAgainStaysRight) {
  const std::vector<Placement> first = client_->plan().placements;
  run(6, 0, 4, 3ms);
  EXPECT_LE(engine_->report().replans, 1u);
  EXPECT_EQ(engine_->report().replans == 1, client_->plan().placements != first);
  EXPECT_GT(client_->plan().prediction.step_s, 0) << "the plan knows times";
}

TEST_F(MeasuredTimes, APlanLeavesTwoWindowsToReadInto) {
  EXPECT_GE(arena_planned_by_time(16 << 10, 28 << 10), 56u << 10);
}

// A group, half of the next, and a window: more than two windows where groups are larger than one.
TEST_F(MeasuredTimes, APlanLeavesAWindowBehindTheNextGroup) {
  EXPECT_GE(arena_planned_by_time(130 << 10, 20 << 10), 56u << 10);
}

TEST_F(MeasuredTimes, UnloadingWithinAPassIsAllowed) {
  for (int pass = 0; pass < 5; ++pass) {
    client_->begin_pass();
    for (size_t group : kInOrder) {
      Lease lease = client_->lease(group);
      ASSERT_TRUE(is_right(group));
    }
    engine_->unload();
    client_->end_pass();
  }
}

// Long enough that a busy machine does not make a usual pass a slow one.
TEST_F(MeasuredTimes, AFewSlowPassesDecideNothing) {
  auto usual = [this] { run(1, 0, 4, 40ms); };
  auto slow = [this](int passes) { run(passes, 0, 8, 60ms); };
  usual();  // the order is a guess
  slow(1);
  usual();
  const Prediction planned = client_->plan().prediction;
  EXPECT_GT(planned.compute_s, 0.16 * 0.9);
  EXPECT_LT(planned.compute_s, 0.32);
  const uint64_t replans = engine_->report().replans;
  usual();
  slow(2);
  usual();
  EXPECT_EQ(engine_->report().replans, replans);
  EXPECT_EQ(client_->plan().prediction.step_s, planned.step_s);
}

TEST_F(MeasuredTimes, APlanThatTurnsOutWrongIsMadeAgain) {
  run(5, 0, 8, 100ms);
  EXPECT_GT(client_->plan().prediction.step_s, 0.7);
  run(3, 0, 4, 12ms);
  EXPECT_LT(client_->plan().prediction.step_s, 0.4);
}

// Every operation on files fails in turn: the run ends with the right weights or the right error,
// leaves nothing leased, and goes on once the fault is gone.
TEST_F(EngineTest, AnyOperationMayFail) {
  using ferry::testing::Fault;
  write({60, 30, 90, 7});
  const std::vector<size_t> order = {0, 1, 2, 3};
  for (auto backend : {io::ReadBackend::automatic, io::ReadBackend::pread}) {
    for (Fault fault : {Fault::io_error, Fault::try_again, Fault::short_read, Fault::slow,
                        Fault::truncated, Fault::changed}) {
      const bool harmless =
          fault == Fault::try_again || fault == Fault::short_read || fault == Fault::slow;
      int failed = 0;
      for (int64_t k = 0;; ++k) {
        ferry::testing::FaultySystem system;
        std::vector<Group> groups = EngineTest::groups();
        auto file = io::File::open(folder_ / "model.safetensors", system);
        for (Group& group : groups) {
          for (weights::BoundSlot& bound : group.slots) bound.source.file = file;
        }
        EngineOptions options = EngineTest::options(40 << 10, 40 << 10);
        options.read.backend = backend;
        Engine engine(options);
        Client client(engine, "model", std::move(groups));
        system.arm(fault, k);
        bool threw = false;
        for (int pass = 0; pass < 2; ++pass) {
          client.begin_pass();
          try {
            for (size_t group : order) {
              Lease lease = client.lease(group);
              ASSERT_TRUE(is_right(group));
            }
            client.end_pass();
          } catch (const IoError& error) {
            threw = true;
            EXPECT_THAT(error.what(), ::testing::HasSubstr("model.safetensors"));
            client.end_pass(false);
          }
        }
        const bool fired = system.fired();
        system.disarm();
        ASSERT_FALSE(threw && harmless) << "operation " << k;
        failed += threw;
        client.unload();  // also what was read ahead and met the fault
        run_pass(client, order);
        client.unload();
        expect_all_stubs();
        if (!fired) break;
      }
      // What goes wrong once while reading ahead is asked for again at the lease; a read that
      // failed is told there.
      if (fault == Fault::io_error) {
        EXPECT_GT(failed, 3);
      }
    }
  }
}

TEST_F(EngineTest, DestructionWhileReadsAreInFlight) {
  write({1000, 1000, 1000, 1000});
  for (int i = 0; i < 20; ++i) {
    Engine engine(options(600 << 10, 600 << 10));
    Client client(engine, "model", groups());
    client.begin_pass();
    client.lease(0);
  }
  expect_all_stubs();
}

}  // namespace
}  // namespace ferry::offload
