#include "ferry/hooks/group_offloading.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <gmock/gmock.h>

#include "ferry/base/error.h"
#include "ferry/hooks/lockstep.h"
#include "ferry/tensor/dtype.h"
#include "offload_fixture.h"

namespace ferry::hooks {
namespace {

class GroupOffloadingTest : public OffloadFixture {};
INSTANTIATE_TEST_SUITE_P(Devices, GroupOffloadingTest, ::testing::Values("cpu", "fake"),
                         device_name);

TEST_P(GroupOffloadingTest, TheDeviceComputesWhatTheCpuDoes) {
  auto [net, binding] = load();
  auto reader = io::make_read_engine();
  weights::load_resident(*binding, *reader);
  EXPECT_TRUE(expected_.to(at::kCPU).equal(net(ids_.to(at::kCPU), false)));
}

TEST_P(GroupOffloadingTest, EqualsResidentBitForBit) {
  for (auto type : {OffloadType::leaf_level, OffloadType::block_level}) {
    for (int64_t per_group : {1, 2, 7}) {
      for (uint64_t budget : {uint64_t{90} << 10, uint64_t{300} << 10, uint64_t{4} << 20}) {
        for (bool gather : {true, false}) {
          if (type == OffloadType::block_level &&
              per_group * (44 << 10) + (36 << 10) > static_cast<int64_t>(budget))
            continue;
          auto [net, binding] = load();
          auto shared = engine(budget);
          auto offloading = apply_group_offloading(*net, binding, shared,
                                                   {.offload_type = type,
                                                    .num_blocks_per_group = per_group,
                                                    .gather_embeddings = gather});
          for (int pass = 0; pass < 3; ++pass) EXPECT_TRUE(net(ids_, false).equal(expected_));
          // Another path through the model, and back.
          for (int pass = 0; pass < 2; ++pass) EXPECT_TRUE(net(ids_, true).equal(expected_skip_));
          EXPECT_TRUE(net(ids_, false).equal(expected_));
          EXPECT_LE(shared->report().peak_bytes, budget);
        }
      }
    }
  }
}

TEST_P(GroupOffloadingTest, WorksInInferenceMode) {
  c10::InferenceMode inference;  // around making and loading the model as well
  auto [net, binding] = load();
  auto offloading = apply_group_offloading(*net, binding, engine(90 << 10));
  for (int pass = 0; pass < 2; ++pass) EXPECT_TRUE(net(ids_, false).equal(expected_));
}

TEST_P(GroupOffloadingTest, CastsAsAResidentLoadDoes) {
  auto resident = this->resident(at::kBFloat16);
  auto [net, binding] = load(at::kBFloat16);
  auto offloading = apply_group_offloading(*net, binding, engine(90 << 10));
  for (int pass = 0; pass < 2; ++pass) EXPECT_TRUE(net(ids_, false).equal(resident(ids_, false)));
}

TEST_P(GroupOffloadingTest, UnleasedSlotsAreLoud) {
  auto [net, binding] = load();
  auto offloading = apply_group_offloading(*net, binding, engine(90 << 10));
  net(ids_, false);
  offloading->client().unload();
  for (const weights::Slot& slot : weights::collect_slots(*net)) {
    EXPECT_TRUE(at::isnan(slot.tensor.to(at::kCPU)).all().item<bool>()) << slot.name();
  }
}

TEST_P(GroupOffloadingTest, SmallAndExcludedWeightsStay) {
  auto [net, binding] = load();
  auto offloading =
      apply_group_offloading(*net, binding, engine(120 << 10, 1 << 10), {.exclude = {"out"}});
  for (const weights::Slot& slot : weights::collect_slots(*net)) {
    bool stays = slot.size_bytes() < 1024 || slot.name().starts_with("out.");
    EXPECT_EQ(!weights::is_stub(slot.tensor), stays) << slot.name();
  }
  EXPECT_TRUE(net(ids_, false).equal(expected_));
}

TEST_P(GroupOffloadingTest, RemovingAndApplyingAgain) {
  auto [net, binding] = load();
  auto shared = engine(90 << 10);
  auto offloading = apply_group_offloading(*net, binding, shared);
  EXPECT_THROW(apply_group_offloading(*net, binding, shared), ArgumentError);
  net(ids_, false);
  offloading->remove();
  read_all(*net, *binding);
  EXPECT_TRUE(net(ids_, false).equal(expected_));
  auto again =
      apply_group_offloading(*net, binding, shared, {.offload_type = OffloadType::block_level});
  EXPECT_TRUE(net(ids_, false).equal(expected_));
}

TEST_P(GroupOffloadingTest, WeightsChangedBeforeAreStreamedAsTheyAre) {
  auto [net, binding] = load();
  read_all(*net, *binding);
  std::vector<weights::Slot> slots = weights::collect_slots(*net);
  {
    at::NoGradGuard no_grad;
    slots[2].tensor.mul_(1.5);                                                  // in place
    slots[5].tensor.set_data((at::randn(slots[5].shape()) * 0.2).to(device_));  // replaced
    slots[0].tensor.add_(0.1);                                                  // the table
  }
  at::Tensor expected = net(ids_, false);
  EXPECT_FALSE(expected.equal(expected_));
  for (bool gather : {true, false}) {
    auto offloading =
        apply_group_offloading(*net, binding, engine(90 << 10), {.gather_embeddings = gather});
    for (int pass = 0; pass < 2; ++pass) EXPECT_TRUE(net(ids_, false).equal(expected));
    offloading->remove();
    read_all(*net, *binding);
    EXPECT_TRUE(net(ids_, false).equal(expected));
  }
}

// Fuse, offload, generate, unfuse: as with weights in memory.
TEST_P(GroupOffloadingTest, WeightsChangedWhileOffloadedAreKept) {
  auto [net, binding] = load();
  auto offloading = apply_group_offloading(*net, binding, engine(90 << 10));
  EXPECT_TRUE(net(ids_, false).equal(expected_));
  auto resident = this->resident();
  at::NoGradGuard no_grad;
  at::manual_seed(9);
  for (double sign : {1.0, -1.0}) {  // exact: the addends are small powers of two
    auto fuse = [&](nn::Module& module, auto&& lease) {
      for (const auto& item : module.named_parameters()) {
        if (!item.key().ends_with("first.weight")) continue;
        [[maybe_unused]] auto held = lease(item.key());
        at::Tensor weight = item.value();
        weight.add_(at::ones_like(weight), sign * 0.25);
      }
    };
    fuse(*resident, [](const std::string&) { return 0; });
    fuse(*net, [&](const std::string& name) { return offloading->lease(name); });
    at::Tensor expected = resident(ids_, false);
    for (int pass = 0; pass < 3; ++pass) EXPECT_TRUE(net(ids_, false).equal(expected));
  }
  EXPECT_EQ(offloading->engine()->report().changed, 10u);
}

TEST_P(GroupOffloadingTest, AModelWithoutACheckpointIsOffloadedToo) {
  auto [net, binding] = load();
  read_all(*net, *binding);
  binding.reset();
  auto offloading = apply_group_offloading(*net, nullptr, engine(90 << 10));
  for (int pass = 0; pass < 2; ++pass) EXPECT_TRUE(net(ids_, false).equal(expected_));
  offloading->remove();
  EXPECT_TRUE(net(ids_, false).equal(expected_)) << "the weights are back in memory";
  auto empty = nn::make<Net>();
  EXPECT_THROW(apply_group_offloading(*empty, nullptr, engine(90 << 10)), ArgumentError);
}

TEST_P(GroupOffloadingTest, WhereItFailsAModelWithoutACheckpointKeepsItsWeights) {
  auto [net, binding] = load();
  read_all(*net, *binding);
  binding.reset();
  EXPECT_THROW(apply_group_offloading(*net, nullptr, engine(4 << 10)), BudgetError);
  EXPECT_TRUE(net(ids_, false).equal(expected_));
}

TEST_P(GroupOffloadingTest, AnEngineOfItsOwnHoldsNoMoreThanItMust) {
  for (auto type : {OffloadType::leaf_level, OffloadType::block_level}) {
    uint64_t peak[2];
    for (bool use_stream : {false, true}) {
      auto [net, binding] = load();
      auto offloading = apply_group_offloading(
          *net, binding,
          GroupOffloadingConfig{
              .offload_type = type, .onload_device = device_, .use_stream = use_stream});
      for (int pass = 0; pass < 3; ++pass) EXPECT_TRUE(net(ids_, false).equal(expected_));
      offload::Report report = offloading->engine()->report();
      EXPECT_EQ(report.misses > 0, !use_stream);
      peak[use_stream] = report.peak_bytes;
    }
    EXPECT_LT(peak[0], peak[1]);
  }
}

TEST_P(GroupOffloadingTest, OptionsThatMeanNothingAreRefused) {
  auto [net, binding] = load();
  EXPECT_THROW(apply_group_offloading(*net, binding, engine(90 << 10), {.num_blocks_per_group = 0}),
               ArgumentError);
  EXPECT_THROW(apply_group_offloading(*net, binding, engine(90 << 10),
                                      {.offload_device = at::Device(at::kMeta)}),
               ArgumentError);
  EXPECT_THROW(apply_group_offloading(*net, binding, engine(90 << 10),
                                      {.onload_device = at::Device(at::kMeta)}),
               ArgumentError);
}

TEST_P(GroupOffloadingTest, MovingAndCastingIsRefusedWhileItIsOn) {
  auto [net, binding] = load();
  auto offloading = apply_group_offloading(*net, binding, engine(90 << 10));
  EXPECT_THROW(net->to(at::kBFloat16), ArgumentError);
  EXPECT_THROW(net->to(device_), ArgumentError);
  EXPECT_TRUE(net(ids_, false).equal(expected_));
  offloading->remove();
  net->to(at::kBFloat16);
}

TEST_P(GroupOffloadingTest, LockstepReadsEachGroupOnceForAllPasses) {
  auto [net, binding] = load();
  at::Tensor other_ids = at::randint(100, {1, 11}).to(device_);
  auto resident = this->resident();
  at::Tensor expected_other = resident(other_ids, false);

  for (auto type : {OffloadType::leaf_level, OffloadType::block_level}) {
    auto offloading =
        apply_group_offloading(*net, binding, engine(100 << 10), {.offload_type = type});
    for (int pass = 0; pass < 2; ++pass) net(ids_, false);
    auto bytes = [&] { return offloading->engine()->report().bytes_read; };
    constexpr int kSteps = 3;
    const uint64_t before = bytes();
    for (int step = 0; step < kSteps; ++step) net(ids_, false);
    // Twice as much would be one after the other. What fits the arena may be on its way at either
    // end.
    const uint64_t once = bytes() - before + (160 << 10);
    for (LockstepTurn turn : {LockstepTurn::group, LockstepTurn::block}) {
      const uint64_t begin = bytes();
      for (int step = 0; step < kSteps; ++step) {
        at::Tensor a, b;
        run_lockstep({offloading.get()},
                     {[&] { a = net(ids_, false); }, [&] { b = net(other_ids, false); }}, turn);
        EXPECT_TRUE(a.equal(expected_));
        EXPECT_TRUE(b.equal(expected_other));
      }
      EXPECT_LE(bytes() - begin, once);
    }
    // A pass that leaves layers out costs some of the saving, no more.
    at::Tensor a, b, c;
    run_lockstep({offloading.get()},
                 {[&] { a = net(ids_, false); }, [&] { b = net(other_ids, false); },
                  [&] { c = net(ids_, true); }});
    EXPECT_TRUE(a.equal(expected_));
    EXPECT_TRUE(b.equal(expected_other));
    EXPECT_TRUE(c.equal(expected_skip_));
    // An error in one pass unwinds the others, and all goes on.
    EXPECT_THROW(run_lockstep({offloading.get()},
                              {[&] { net(ids_, false); },
                               [&] {
                                 net(at::full({1, 2}, 1000, at::kLong).to(device_), false);
                               }}),
                 std::exception);
    EXPECT_TRUE(net(ids_, false).equal(expected_));
    offloading->remove();
  }
}

// Where passes take turns decides what those that wait hold: a group's activations, or a block's.
TEST_P(GroupOffloadingTest, LockstepTakesTurnsWhereItIsTold) {
  auto [net, binding] = load();
  auto offloading = apply_group_offloading(*net, binding, engine(4 << 20));
  // Which pass it is, by the size of its batch.
  class Log : public nn::ModuleHook {
   public:
    explicit Log(std::string& into) : into_(into) {}
    bool wants_outputs() const override { return true; }
    void outputs(nn::Module&, const std::vector<at::Tensor>& tensors) override {
      into_ += tensors[0].size(0) == 2 ? 'a' : 'b';
    }

   private:
    std::string& into_;
  };
  std::string seen;
  for (const auto& entry : net->named_modules()) {
    if (entry.key() == "blocks.0.first" || entry.key() == "blocks.0.second")
      dynamic_cast<nn::Module&>(*entry.value()).add_hook("log", std::make_shared<Log>(seen));
  }
  for (auto [turn, expected] :
       {std::pair{LockstepTurn::group, "abab"}, std::pair{LockstepTurn::block, "aabb"}}) {
    seen.clear();
    run_lockstep({offloading.get()},
                 {[&] { net(ids_, false); }, [&] { net(ids_.narrow(0, 0, 1), false); }}, turn);
    EXPECT_EQ(seen, expected);
  }
}

// ---- training ----

TEST_P(GroupOffloadingTest, GradientsEqualThoseOfResidentWeights) {
  auto gradients = [&](nn::Ptr<Net>& net) {
    for (at::Tensor& parameter : net->parameters()) {
      parameter.requires_grad_();
      parameter.mutable_grad().reset();
    }
    at::Tensor out = net(ids_, false);
    EXPECT_TRUE(out.requires_grad());
    out.square().sum().backward();
    std::vector<at::Tensor> result;
    for (const at::Tensor& parameter : net->parameters())
      result.push_back(parameter.grad().clone());
    return result;
  };
  auto resident = this->resident();
  const std::vector<at::Tensor> expected = gradients(resident);
  for (auto type : {OffloadType::leaf_level, OffloadType::block_level}) {
    for (uint64_t budget : {uint64_t{100} << 10, uint64_t{4} << 20}) {
      auto [net, binding] = load();
      auto offloading = apply_group_offloading(*net, binding, engine(budget),
                                               {.offload_type = type, .gather_embeddings = false});
      for (int step = 0; step < 2; ++step) {
        const std::vector<at::Tensor> got = gradients(net);
        for (size_t i = 0; i < expected.size(); ++i) {
          EXPECT_TRUE(got[i].equal(expected[i])) << net->named_parameters()[i].key();
        }
      }
      EXPECT_LE(offloading->engine()->report().peak_bytes, budget);
    }
  }
}

// Weights may go between a forward and its backward, also those that no block holds.
TEST_P(GroupOffloadingTest, AGraphOutlivesTheWeightsOfItsForward) {
  auto gradients = [&](nn::Ptr<Net>& net, const std::function<void()>& between) {
    for (at::Tensor& parameter : net->parameters()) parameter.requires_grad_();
    at::Tensor loss = net->run(ids_, {0, 1, 2, 3, 4}).square().sum();
    between();
    loss.backward();
    std::vector<at::Tensor> result;
    for (const at::Tensor& parameter : net->parameters())
      result.push_back(parameter.grad().clone());
    return result;
  };
  auto resident = this->resident();
  const std::vector<at::Tensor> expected = gradients(resident, [] {});
  for (auto type : {OffloadType::leaf_level, OffloadType::block_level}) {
    auto [net, binding] = load();
    auto offloading = apply_group_offloading(*net, binding, engine(120 << 10),
                                             {.offload_type = type, .gather_embeddings = false});
    auto streamed = net;
    const std::vector<at::Tensor> got = gradients(streamed, [&] { offloading->client().unload(); });
    for (size_t i = 0; i < expected.size(); ++i)
      EXPECT_TRUE(got[i].equal(expected[i])) << net->named_parameters()[i].key();
  }
}

TEST_P(GroupOffloadingTest, GradientsOfTheInputAlone) {
  auto block_gradient = [&](nn::Module& root) {
    auto list = std::dynamic_pointer_cast<nn::ModuleList<Block>>(root.named_children()["blocks"]);
    at::manual_seed(5);
    at::Tensor x = at::randn({3, 48}).to(device_).requires_grad_();
    (*list)[2]((*list)[1](x, false), true).square().sum().backward();
    return x.grad();
  };
  auto resident = this->resident();
  auto [net, binding] = load();
  auto offloading = apply_group_offloading(*net, binding, engine(90 << 10));
  EXPECT_TRUE(block_gradient(*net).equal(block_gradient(*resident)));
}

// A graph that was made around the call point would hold memory of the arena.
TEST_P(GroupOffloadingTest, AGraphOverStreamedWeightsIsAnErrorNotGarbage) {
  auto [net, binding] = load();
  auto offloading = apply_group_offloading(*net, binding, engine(90 << 10));
  const std::string name = "blocks.0.first.weight";
  at::Tensor weight = net->named_parameters()[name];
  at::Tensor x = at::randn({2, 48}).to(device_).requires_grad_();
  at::Tensor loss;
  {
    offload::Lease lease = offloading->lease(name);
    loss = at::linear(x, weight).sum();
  }
  EXPECT_THROW(loss.backward(), c10::Error);
}

TEST_P(GroupOffloadingTest, RowsFromDiskCannotBeTrained) {
  auto [net, binding] = load();
  auto offloading = apply_group_offloading(*net, binding, engine(90 << 10));
  net->named_parameters()["table.weight"].requires_grad_();
  EXPECT_THROW(net(ids_, false), ArgumentError);
}

TEST_P(GroupOffloadingTest, UnknownNamesAreRefused) {
  auto [net, binding] = load();
  EXPECT_THROW(apply_group_offloading(*net, binding, engine(1 << 20), {.exclude = {"nothing"}}),
               ArgumentError);
}

TEST_P(GroupOffloadingTest, AnErrorInsideAForwardReleasesEverything) {
  auto [net, binding] = load();
  auto offloading = apply_group_offloading(*net, binding, engine(90 << 10));
  EXPECT_ANY_THROW(net(at::full({2, 7}, 1000, at::kLong).to(device_), false));
  EXPECT_TRUE(net(ids_, false).equal(expected_));
}

}  // namespace
}  // namespace ferry::hooks
