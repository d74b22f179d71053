#include "ferry/hooks/group_offloading.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>

#include "ferry/base/error.h"
#include "ferry/hooks/lockstep.h"
#include "ferry/io/safetensors.h"
#include "ferry/nn/embedding.h"
#include "ferry/nn/linear.h"
#include "ferry/tensor/dtype.h"
#include "ferry/weights/stub.h"

namespace ferry::hooks {
namespace {

namespace fs = std::filesystem;

// A parameter of its own, two linears, and a choice whether the second runs.
class Block : public nn::Module {
 public:
  Block() {
    scale_ = stub_parameter("scale", {48});
    first_ = nn::make<nn::Linear>(48, 96);
    second_ = nn::make<nn::Linear>(96, 48);
    register_module("first", first_);
    register_module("second", second_);
  }
  at::Tensor forward(const at::Tensor& x, bool skip) {
    at::Tensor hidden = first_(x * scale_);
    return skip ? x + hidden.narrow(-1, 0, 48) : x + second_(at::gelu(hidden));
  }

 private:
  at::Tensor scale_;
  nn::Ptr<nn::Linear> first_, second_;
};

// A table, blocks in a list, and a head that is tied to the table.
class Net : public nn::Module {
 public:
  Net() {
    table_ = nn::make<nn::Embedding>(100, 48);
    blocks_ = nn::make<nn::ModuleList<Block>>();
    out_ = nn::make<nn::Linear>(48, 48);
    register_module("table", table_);
    register_module("blocks", blocks_);
    register_module("out", out_);
    for (int i = 0; i < 5; ++i) blocks_->push_back(nn::make<Block>());
  }
  at::Tensor forward(const at::Tensor& ids, bool skip = false) {
    at::Tensor x = table_(ids);
    for (const auto& block : *blocks_) x = block(x, skip);
    return out_(x);
  }

 private:
  nn::Ptr<nn::Embedding> table_;
  nn::Ptr<nn::ModuleList<Block>> blocks_;
  nn::Ptr<nn::Linear> out_;
};

class GroupOffloadingTest : public testing::Test {
 protected:
  GroupOffloadingTest() {
    std::string name = testing::TempDir() + "/hooks.XXXXXX";
    folder_ = ::mkdtemp(name.data());
    at::manual_seed(2);
    std::vector<io::SafetensorsWriter::Entry> entries;
    std::vector<at::Tensor> values;
    auto net = nn::make<Net>();
    for (const weights::Slot& slot : weights::collect_slots(*net)) {
      entries.push_back({slot.name(), io::Dtype::F32, slot.shape().vec()});
      values.push_back(at::randn(slot.shape()) * 0.2);
    }
    io::SafetensorsWriter writer(folder_ / "model.safetensors", entries);
    for (const at::Tensor& value : values) {
      writer.write({static_cast<const std::byte*>(value.const_data_ptr()),
                    static_cast<size_t>(value.nbytes())});
    }
    writer.finish();
    ids_ = at::randint(100, {2, 7});
    auto [resident, binding] = load();
    auto reader = io::make_read_engine();
    weights::load_resident(*binding, *reader);
    expected_ = resident(ids_, false);
    expected_skip_ = resident(ids_, true);
  }
  ~GroupOffloadingTest() override { fs::remove_all(folder_); }

  std::pair<nn::Ptr<Net>, std::shared_ptr<weights::Binding>> load(
      std::optional<at::ScalarType> dtype = {}) {
    auto net = nn::make<Net>();
    weights::BindOptions options;
    if (dtype) options.dtype = [=](const std::string&, at::ScalarType) { return *dtype; };
    auto binding =
        weights::bind(*net, weights::Checkpoint::open_file(folder_ / "model.safetensors"), options);
    return {net, binding};
  }

  static std::shared_ptr<offload::Engine> engine(uint64_t budget, uint64_t small = 0) {
    offload::EngineOptions options;
    options.weights_memory_bytes = budget;
    options.preferred_arena_bytes = 48 << 10;
    options.small_slot_bytes = small;
    return std::make_shared<offload::Engine>(options);
  }

  fs::path folder_;
  at::Tensor ids_, expected_, expected_skip_;
};

TEST_F(GroupOffloadingTest, EqualsResidentBitForBit) {
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

TEST_F(GroupOffloadingTest, WorksInInferenceMode) {
  c10::InferenceMode inference;  // around making and loading the model as well
  auto [net, binding] = load();
  auto offloading = apply_group_offloading(*net, binding, engine(90 << 10));
  for (int pass = 0; pass < 2; ++pass) EXPECT_TRUE(net(ids_, false).equal(expected_));
}

TEST_F(GroupOffloadingTest, CastsAsAResidentLoadDoes) {
  auto [resident, resident_binding] = load(at::kBFloat16);
  auto reader = io::make_read_engine();
  weights::load_resident(*resident_binding, *reader);
  auto [net, binding] = load(at::kBFloat16);
  auto offloading = apply_group_offloading(*net, binding, engine(90 << 10));
  for (int pass = 0; pass < 2; ++pass) EXPECT_TRUE(net(ids_, false).equal(resident(ids_, false)));
}

TEST_F(GroupOffloadingTest, UnleasedSlotsAreLoud) {
  auto [net, binding] = load();
  auto offloading = apply_group_offloading(*net, binding, engine(90 << 10));
  net(ids_, false);
  offloading->client().unload();
  for (const weights::Slot& slot : weights::collect_slots(*net)) {
    EXPECT_TRUE(at::isnan(slot.tensor).all().item<bool>()) << slot.name();
  }
}

TEST_F(GroupOffloadingTest, SmallAndExcludedWeightsStay) {
  auto [net, binding] = load();
  auto offloading =
      apply_group_offloading(*net, binding, engine(120 << 10, 1 << 10), {.exclude = {"out"}});
  for (const weights::Slot& slot : weights::collect_slots(*net)) {
    bool stays = slot.size_bytes() < 1024 || slot.name().starts_with("out.");
    EXPECT_EQ(!weights::is_stub(slot.tensor), stays) << slot.name();
  }
  EXPECT_TRUE(net(ids_, false).equal(expected_));
}

TEST_F(GroupOffloadingTest, RemovingAndApplyingAgain) {
  auto [net, binding] = load();
  auto shared = engine(90 << 10);
  auto offloading = apply_group_offloading(*net, binding, shared);
  EXPECT_THROW(apply_group_offloading(*net, binding, shared), ArgumentError);
  net(ids_, false);
  offloading->remove();
  auto reader = io::make_read_engine();
  weights::load_resident(*binding, *reader);
  EXPECT_TRUE(net(ids_, false).equal(expected_));
  auto again =
      apply_group_offloading(*net, binding, shared, {.offload_type = OffloadType::block_level});
  EXPECT_TRUE(net(ids_, false).equal(expected_));
}

TEST_F(GroupOffloadingTest, WeightsChangedBeforeAreStreamedAsTheyAre) {
  auto [net, binding] = load();
  auto reader = io::make_read_engine();
  weights::load_resident(*binding, *reader);
  std::vector<weights::Slot> slots = weights::collect_slots(*net);
  {
    at::NoGradGuard no_grad;
    slots[2].tensor.mul_(1.5);                                    // in place
    slots[5].tensor.set_data(at::randn(slots[5].shape()) * 0.2);  // replaced
    slots[0].tensor.add_(0.1);                                    // the table
  }
  at::Tensor expected = net(ids_, false);
  EXPECT_FALSE(expected.equal(expected_));
  for (bool gather : {true, false}) {
    auto offloading =
        apply_group_offloading(*net, binding, engine(90 << 10), {.gather_embeddings = gather});
    for (int pass = 0; pass < 2; ++pass) EXPECT_TRUE(net(ids_, false).equal(expected));
    offloading->remove();
    weights::load_resident(*binding, *reader);
    EXPECT_TRUE(net(ids_, false).equal(expected));
  }
}

// Fuse, offload, generate, unfuse: as with weights in memory.
TEST_F(GroupOffloadingTest, WeightsChangedWhileOffloadedAreKept) {
  auto [net, binding] = load();
  auto offloading = apply_group_offloading(*net, binding, engine(90 << 10));
  EXPECT_TRUE(net(ids_, false).equal(expected_));
  auto [resident, resident_binding] = load();
  auto reader = io::make_read_engine();
  weights::load_resident(*resident_binding, *reader);
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

TEST_F(GroupOffloadingTest, AModelWithoutACheckpointIsOffloadedToo) {
  auto [net, binding] = load();
  auto reader = io::make_read_engine();
  weights::load_resident(*binding, *reader);
  binding.reset();
  auto offloading = apply_group_offloading(*net, nullptr, engine(90 << 10));
  for (int pass = 0; pass < 2; ++pass) EXPECT_TRUE(net(ids_, false).equal(expected_));
  offloading->remove();
  EXPECT_TRUE(net(ids_, false).equal(expected_)) << "the weights are back in memory";
  auto empty = nn::make<Net>();
  EXPECT_THROW(apply_group_offloading(*empty, nullptr, engine(90 << 10)), ArgumentError);
}

TEST_F(GroupOffloadingTest, AnEngineOfItsOwnHoldsNoMoreThanItMust) {
  for (auto type : {OffloadType::leaf_level, OffloadType::block_level}) {
    uint64_t peak[2];
    for (bool use_stream : {false, true}) {
      auto [net, binding] = load();
      auto offloading = apply_group_offloading(
          *net, binding, GroupOffloadingConfig{.offload_type = type, .use_stream = use_stream});
      for (int pass = 0; pass < 3; ++pass) EXPECT_TRUE(net(ids_, false).equal(expected_));
      offload::Report report = offloading->engine()->report();
      EXPECT_EQ(report.misses > 0, !use_stream);
      peak[use_stream] = report.peak_bytes;
    }
    EXPECT_LT(peak[0], peak[1]);
  }
}

TEST_F(GroupOffloadingTest, OptionsThatMeanNothingAreRefused) {
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

TEST_F(GroupOffloadingTest, MovingAndCastingIsRefusedWhileItIsOn) {
  auto [net, binding] = load();
  auto offloading = apply_group_offloading(*net, binding, engine(90 << 10));
  EXPECT_THROW(net->to(at::kBFloat16), ArgumentError);
  EXPECT_THROW(net->to(at::Device(at::kCPU)), ArgumentError);
  EXPECT_TRUE(net(ids_, false).equal(expected_));
  offloading->remove();
  net->to(at::kBFloat16);
}

TEST_F(GroupOffloadingTest, LockstepReadsEachGroupOnceForAllPasses) {
  auto [net, binding] = load();
  at::Tensor other_ids = at::randint(100, {1, 11});
  auto reader = io::make_read_engine();
  auto [resident, resident_binding] = load();
  weights::load_resident(*resident_binding, *reader);
  at::Tensor expected_other = resident(other_ids, false);

  for (auto type : {OffloadType::leaf_level, OffloadType::block_level}) {
    auto offloading =
        apply_group_offloading(*net, binding, engine(100 << 10), {.offload_type = type});
    for (int pass = 0; pass < 2; ++pass) net(ids_, false);
    auto bytes = [&] { return offloading->engine()->report().bytes_read; };
    const uint64_t before = bytes();
    net(ids_, false);
    // A group or two more or less may be on their way at the end of a pass.
    const uint64_t one_pass = bytes() - before + (88 << 10);
    for (int step = 0; step < 3; ++step) {
      const uint64_t begin = bytes();
      at::Tensor a, b;
      run_lockstep({offloading.get()},
                   {[&] { a = net(ids_, false); }, [&] { b = net(other_ids, false); }});
      EXPECT_TRUE(a.equal(expected_));
      EXPECT_TRUE(b.equal(expected_other));
      EXPECT_LE(bytes() - begin, one_pass) << "step " << step;
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
    EXPECT_THROW(run_lockstep({offloading.get()}, {[&] { net(ids_, false); },
                                                   [&] {
                                                     net(at::full({1, 2}, 1000, at::kLong), false);
                                                   }}),
                 std::exception);
    EXPECT_TRUE(net(ids_, false).equal(expected_));
    offloading->remove();
  }
}

// ---- training ----

TEST_F(GroupOffloadingTest, GradientsEqualThoseOfResidentWeights) {
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
  auto [resident, resident_binding] = load();
  auto reader = io::make_read_engine();
  weights::load_resident(*resident_binding, *reader);
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

TEST_F(GroupOffloadingTest, GradientsOfTheInputAlone) {
  auto block_gradient = [&](nn::Module& root) {
    auto list = std::dynamic_pointer_cast<nn::ModuleList<Block>>(root.named_children()["blocks"]);
    at::manual_seed(5);
    at::Tensor x = at::randn({3, 48}).requires_grad_();
    (*list)[2]((*list)[1](x, false), true).square().sum().backward();
    return x.grad();
  };
  auto [resident, resident_binding] = load();
  auto reader = io::make_read_engine();
  weights::load_resident(*resident_binding, *reader);
  auto [net, binding] = load();
  auto offloading = apply_group_offloading(*net, binding, engine(90 << 10));
  EXPECT_TRUE(block_gradient(*net).equal(block_gradient(*resident)));
}

// A graph that was made around the call point would hold memory of the arena.
TEST_F(GroupOffloadingTest, AGraphOverStreamedWeightsIsAnErrorNotGarbage) {
  auto [net, binding] = load();
  auto offloading = apply_group_offloading(*net, binding, engine(90 << 10));
  const std::string name = "blocks.0.first.weight";
  at::Tensor weight = net->named_parameters()[name];
  at::Tensor x = at::randn({2, 48}).requires_grad_();
  at::Tensor loss;
  {
    offload::Lease lease = offloading->lease(name);
    loss = at::linear(x, weight).sum();
  }
  EXPECT_THROW(loss.backward(), c10::Error);
}

TEST_F(GroupOffloadingTest, RowsFromDiskCannotBeTrained) {
  auto [net, binding] = load();
  auto offloading = apply_group_offloading(*net, binding, engine(90 << 10));
  net->named_parameters()["table.weight"].requires_grad_();
  EXPECT_THROW(net(ids_, false), ArgumentError);
}

TEST_F(GroupOffloadingTest, UnknownNamesAreRefused) {
  auto [net, binding] = load();
  EXPECT_THROW(apply_group_offloading(*net, binding, engine(1 << 20), {.exclude = {"nothing"}}),
               ArgumentError);
}

TEST_F(GroupOffloadingTest, AnErrorInsideAForwardReleasesEverything) {
  auto [net, binding] = load();
  auto offloading = apply_group_offloading(*net, binding, engine(90 << 10));
  EXPECT_ANY_THROW(net(at::full({2, 7}, 1000, at::kLong), false));
  EXPECT_TRUE(net(ids_, false).equal(expected_));
}

}  // namespace
}  // namespace ferry::hooks
