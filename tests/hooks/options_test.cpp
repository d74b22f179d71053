// Every option of diffusers' apply_group_offloading, and what models do that offloading has to cope
// with; on the CPU and on an accelerator.
#include <gmock/gmock.h>

#include "ferry/base/error.h"
#include "offload_fixture.h"

namespace ferry::hooks {
namespace {

class OffloadOptionsTest : public OffloadFixture {
 protected:
  struct Outcome {
    offload::Report first, second;  // after two and after four passes
    size_t groups = 0;
  };
  // Offloaded with an engine of its own, four passes give what resident weights do.
  Outcome run(GroupOffloadingConfig config) {
    config.onload_device = device_;
    auto [net, binding] = load();
    auto offloading = apply_group_offloading(*net, binding, config);
    Outcome outcome;
    for (int pass = 0; pass < 2; ++pass) EXPECT_TRUE(net(ids_, false).equal(expected_));
    outcome.first = offloading->engine()->report();
    for (int pass = 0; pass < 2; ++pass) EXPECT_TRUE(net(ids_, false).equal(expected_));
    outcome.second = offloading->engine()->report();
    outcome.groups = offloading->client().group_count();
    return outcome;
  }
};
INSTANTIATE_TEST_SUITE_P(Devices, OffloadOptionsTest, ::testing::Values("cpu", "fake"),
                         device_name);

constexpr auto kTypes = {OffloadType::leaf_level, OffloadType::block_level};

// ---- apply_group_offloading's arguments ----

TEST_P(OffloadOptionsTest, OnloadAndOffloadDevice) {
  auto [net, binding] = load();
  auto offloading = apply_group_offloading(
      *net, binding,
      GroupOffloadingConfig{.onload_device = device_, .offload_device = at::Device(at::kCPU)});
  EXPECT_EQ(offloading->engine()->options().device, device_);
  const std::string name = "blocks.2.first.weight";
  at::Tensor weight = net->named_parameters()[name];
  {
    offload::Lease lease = offloading->lease(name);
    EXPECT_EQ(weight.device(), device_);
    EXPECT_FALSE(weights::is_stub(weight));
  }
  EXPECT_EQ(net(ids_, false).device(), device_);
  EXPECT_EQ(weight.device(), device_) << "a stub says where the weight is used";
}

TEST_P(OffloadOptionsTest, NumBlocksPerGroupWithStreams) {
  for (int64_t blocks : {1, 2, 3, 5, 9}) {
    Outcome outcome = run({.offload_type = OffloadType::block_level,
                           .num_blocks_per_group = blocks,
                           .use_stream = true,
                           .record_stream = true});
    // and what no block holds
    EXPECT_EQ(outcome.groups, static_cast<size_t>((5 + blocks - 1) / blocks + 1)) << blocks;
  }
}

TEST_P(OffloadOptionsTest, UseStreamReadsAhead) {
  for (auto type : kTypes) {
    Outcome off = run({.offload_type = type, .use_stream = false});
    Outcome on = run({.offload_type = type, .use_stream = true});
    EXPECT_GT(off.second.misses, 0u);
    EXPECT_EQ(on.second.misses, 0u);
    EXPECT_LT(off.second.peak_bytes, on.second.peak_bytes) << "room to read ahead into";
  }
}

TEST_P(OffloadOptionsTest, NonBlockingAndRecordStreamChangeNoResult) {
  for (auto type : kTypes) {
    for (bool non_blocking : {false, true}) {
      for (bool record_stream : {false, true}) {
        for (bool use_stream : {false, true}) {
          run({.offload_type = type,
               .use_stream = use_stream,
               .non_blocking = non_blocking,
               .record_stream = record_stream});
        }
      }
    }
  }
}

TEST_P(OffloadOptionsTest, LowCpuMemUsageKeepsNoCopyInHostMemory) {
  for (auto type : kTypes) {
    Outcome copied = run({.offload_type = type, .low_cpu_mem_usage = false});
    Outcome low = run({.offload_type = type, .low_cpu_mem_usage = true});
    EXPECT_GT(low.second.bytes_read, low.first.bytes_read) << "from disk each time";
    if (!on_accelerator()) continue;
    EXPECT_EQ(copied.second.bytes_read, copied.first.bytes_read) << "from host memory";
  }
}

TEST_P(OffloadOptionsTest, OffloadToDiskPathReadsTheCheckpointAndWritesNothing) {
  const std::filesystem::path folder = folder_ / "disk";
  std::filesystem::create_directory(folder);
  for (auto type : kTypes) {
    Outcome outcome = run({.offload_type = type, .offload_to_disk_path = folder});
    EXPECT_GT(outcome.second.bytes_read, outcome.first.bytes_read);
    EXPECT_TRUE(std::filesystem::is_empty(folder));
  }
}

TEST_P(OffloadOptionsTest, BlockModulesNamesTheLists) {
  // Named, or found: the same groups. A list that is not named belongs to the top level.
  EXPECT_EQ(run({.offload_type = OffloadType::block_level, .block_modules = {"blocks"}}).groups,
            run({.offload_type = OffloadType::block_level}).groups);
  auto [net, binding] = load();
  EXPECT_THROW(apply_group_offloading(
                   *net, binding, engine(1 << 20),
                   {.offload_type = OffloadType::block_level, .block_modules = {"no_such_list"}}),
               ArgumentError);
  EXPECT_TRUE(weights::is_stub(net->parameters()[0])) << "a refused call changed something";
}

TEST_P(OffloadOptionsTest, ExcludedModulesStayOnTheDevice) {
  for (auto type : kTypes) {
    auto [net, binding] = load();
    auto offloading = apply_group_offloading(
        *net, binding, engine(300 << 10),
        {.offload_type = type, .exclude = {"table", "blocks.1", "blocks.3.second"}});
    for (int pass = 0; pass < 2; ++pass) EXPECT_TRUE(net(ids_, false).equal(expected_));
    offloading->client().unload();
    for (const weights::Slot& slot : weights::collect_slots(*net)) {
      const std::string& name = slot.name();
      const bool stays = name.starts_with("table.") || name.starts_with("blocks.1.") ||
                         name.starts_with("blocks.3.second.");
      EXPECT_EQ(!weights::is_stub(slot.tensor), stays) << name;
      EXPECT_EQ(slot.tensor.device(), device_) << name;
    }
  }
}

// ---- what is grouped ----

TEST_P(OffloadOptionsTest, TheTopLevelGroupHoldsWhatNoBlockHolds) {
  auto [net, binding] = load();
  auto offloading = apply_group_offloading(
      *net, binding, engine(200 << 10),
      {.offload_type = OffloadType::block_level, .gather_embeddings = false});
  ASSERT_EQ(offloading->client().group_count(), 6u);
  EXPECT_TRUE(net(ids_, false).equal(expected_));
  offloading->client().unload();
  offload::Lease lease = offloading->lease("out.weight");
  for (const weights::Slot& slot : weights::collect_slots(*net)) {
    EXPECT_EQ(weights::is_stub(slot.tensor), slot.name().starts_with("blocks.")) << slot.name();
  }
}

TEST_P(OffloadOptionsTest, ParametersAndBuffersOfAParent) {
  auto [net, binding] = load();
  auto offloading = apply_group_offloading(*net, binding, engine(90 << 10));
  EXPECT_TRUE(net(ids_, false).equal(expected_));
  offloading->client().unload();
  // Those of one parent move together, without its children's.
  offload::Lease lease = offloading->lease("blocks.1.scale");
  for (const weights::Slot& slot : weights::collect_slots(*net)) {
    const bool here = slot.name() == "blocks.1.scale" || slot.name() == "blocks.1.shift";
    EXPECT_EQ(!weights::is_stub(slot.tensor), here) << slot.name();
  }
}

TEST_P(OffloadOptionsTest, SharedModulesAndTiedParameters) {
  auto resident = this->resident<SharedNet>();
  const at::Tensor expected = resident(ids_);
  for (auto type : kTypes) {
    for (int64_t blocks : {1, 3}) {
      if (blocks > 1 && type == OffloadType::leaf_level) continue;
      for (bool gather : {true, false}) {
        for (uint64_t budget : {uint64_t{0}, uint64_t{110} << 10}) {
          for (bool use_stream : {true, false}) {
            auto [net, binding] = load<SharedNet>();
            auto offloading = apply_group_offloading(*net, binding, engine(budget),
                                                     {.offload_type = type,
                                                      .num_blocks_per_group = blocks,
                                                      .use_stream = use_stream,
                                                      .gather_embeddings = gather});
            for (int pass = 0; pass < 3; ++pass) EXPECT_TRUE(net(ids_).equal(expected));
            if (budget > 0) {
              EXPECT_LE(offloading->engine()->report().peak_bytes, budget);
            }
          }
        }
      }
    }
  }
}

// ---- the order ----

TEST_P(OffloadOptionsTest, ModulesCalledTwiceOrNotAtAllOrInAnotherOrder) {
  auto resident = this->resident();
  const std::vector<std::vector<size_t>> orders = {
      {0, 1, 2, 3, 4}, {0, 0, 1, 1, 2, 2}, {4, 3, 2, 1, 0}, {2, 4, 2, 4, 2}, {}, {3}};
  for (auto type : kTypes) {
    for (bool use_stream : {true, false}) {
      auto [net, binding] = load();
      auto offloading = apply_group_offloading(*net, binding, engine(100 << 10),
                                               {.offload_type = type, .use_stream = use_stream});
      for (int round = 0; round < 2; ++round) {
        for (const std::vector<size_t>& order : orders) {
          const at::Tensor expected = resident->run(ids_, order);
          for (int repeat = 0; repeat < 2; ++repeat)
            EXPECT_TRUE(net->run(ids_, order).equal(expected));
        }
      }
      EXPECT_LE(offloading->engine()->report().peak_bytes, 100u << 10);
    }
  }
}

TEST_P(OffloadOptionsTest, SeveralEntryPointsTakeTurns) {
  auto resident = this->resident();
  const std::vector<size_t> order = {1, 3, 1};
  const at::Tensor expected_run = resident->run(ids_, order);
  for (auto type : kTypes) {
    auto [net, binding] = load();
    auto offloading =
        apply_group_offloading(*net, binding, engine(100 << 10), {.offload_type = type});
    for (int pass = 0; pass < 3; ++pass) {
      EXPECT_TRUE(net(ids_, false).equal(expected_));
      EXPECT_TRUE(net->run(ids_, order).equal(expected_run));
      EXPECT_TRUE(net(ids_, true).equal(expected_skip_));
    }
  }
}

// ---- on, off, and on again ----

TEST_P(OffloadOptionsTest, AppliedAgainAfterWeightsChanged) {
  auto [net, binding] = load();
  auto shared = engine(100 << 10);
  auto offloading = apply_group_offloading(*net, binding, shared);
  EXPECT_TRUE(net(ids_, false).equal(expected_));
  offloading->remove();
  for (double factor : {1.5, 0.25}) {
    read_all(*net, *binding);
    {
      at::NoGradGuard no_grad;
      net->named_parameters()["blocks.2.second.weight"].mul_(factor);
      net->named_parameters()["table.weight"].mul_(factor);
    }
    const at::Tensor changed = net(ids_, false);
    EXPECT_FALSE(changed.equal(expected_));
    for (auto type : kTypes) {
      auto again = apply_group_offloading(*net, binding, shared, {.offload_type = type});
      for (int pass = 0; pass < 2; ++pass) EXPECT_TRUE(net(ids_, false).equal(changed));
      again->remove();
    }
  }
}

TEST_P(OffloadOptionsTest, RemovedWhileGroupsAreOnTheirWay) {
  for (auto type : kTypes) {
    auto [net, binding] = load();
    auto shared = engine(100 << 10);
    auto offloading = apply_group_offloading(*net, binding, shared, {.offload_type = type});
    net(ids_, false);  // the first groups of the next pass are being brought
    offloading->remove();
    for (const weights::Slot& slot : weights::collect_slots(*net))
      EXPECT_TRUE(weights::is_stub(slot.tensor)) << slot.name();
    read_all(*net, *binding);
    EXPECT_TRUE(net(ids_, false).equal(expected_));
  }
}

}  // namespace
}  // namespace ferry::hooks
