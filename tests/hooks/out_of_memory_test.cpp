// A forward that meets the end of the accelerator's memory: weights make room, and it runs again.
#include <gmock/gmock.h>

#include "ferry/base/error.h"
#include "ferry/hooks/lockstep.h"
#include "offload_fixture.h"

namespace ferry::hooks {
namespace {

using ::testing::AllOf;
using testing::FakeAccelerator;
using ::testing::HasSubstr;

// Activations of about as much as the weights.
class OutOfMemoryTest : public OffloadFixture {
 protected:
  static constexpr uint64_t kBudget = 400 << 10;  // everything resident

  OutOfMemoryTest() {
    large_ = at::randint(100, {6, 40}).to(device_);
    auto resident = this->resident();
    expected_large_ = resident(large_, false).to(at::kCPU);
    // What a forward takes beside the weights, measured.
    auto [net, binding] = load();
    auto shared = engine(kBudget);
    auto offloading = apply_group_offloading(*net, binding, shared, {.gather_embeddings = false});
    FakeAccelerator::drain();
    FakeAccelerator::reset_peak();
    const uint64_t before = FakeAccelerator::live_bytes();
    net(large_, false);
    FakeAccelerator::drain();
    activations_ = FakeAccelerator::peak_bytes() - before - shared->report().peak_bytes;
  }
  // What stays allowed beyond what is allocated now.
  static void leave(uint64_t bytes) {
    FakeAccelerator::drain();
    FakeAccelerator::set_options({.capacity_bytes = FakeAccelerator::live_bytes() + bytes});
  }
  bool right(const at::Tensor& out) const { return out.to(at::kCPU).equal(expected_large_); }

  at::Tensor large_, expected_large_;
  uint64_t activations_ = 0;
};
INSTANTIATE_TEST_SUITE_P(Devices, OutOfMemoryTest, ::testing::Values("fake"), device_name);

TEST_P(OutOfMemoryTest, AForwardRunsAgainWithLessForWeights) {
  for (auto type : {OffloadType::leaf_level, OffloadType::block_level}) {
    FakeAccelerator::set_options({});
    auto [net, binding] = load();
    auto shared = engine(kBudget);
    auto offloading = apply_group_offloading(*net, binding, shared,
                                             {.offload_type = type, .gather_embeddings = false});
    const uint64_t planned = offloading->client().plan().peak_bytes();
    ASSERT_EQ(offloading->client().plan().streamed_bytes, 0u);
    leave(planned + activations_ - (40 << 10));
    for (int pass = 0; pass < 3; ++pass) EXPECT_TRUE(right(net(large_, false))) << pass;
    const offload::Report report = shared->report();
    EXPECT_EQ(report.shrinks, 1u) << "and what it shrank to serves from then on";
    EXPECT_GT(offloading->client().plan().streamed_bytes, 0u);
    EXPECT_LT(offloading->client().plan().peak_bytes(), planned - (40 << 10));
  }
}

TEST_P(OutOfMemoryTest, WhereNothingHelpsTheErrorSaysTheNumbers) {
  auto [net, binding] = load();
  auto shared = engine(kBudget);
  auto offloading = apply_group_offloading(*net, binding, shared, {.gather_embeddings = false});
  std::string told;
  for (int attempt = 0; attempt < 2; ++attempt) {
    leave(offloading->client().plan().peak_bytes() / 4 + activations_ / 2);
    shared->unload();
    try {
      net(large_, false);
      FAIL() << "there was room";
    } catch (const DeviceError& error) {
      told = error.what();
    }
    EXPECT_THAT(told, AllOf(HasSubstr("Tried to allocate"), HasSubstr("small tensors"),
                            HasSubstr("resident"), HasSubstr("the least that would do is"),
                            HasSubstr("are free"), HasSubstr("smaller picture")));
  }
  // Nothing is left behind: with room again, it goes on.
  FakeAccelerator::set_options({});
  shared->set_weights_memory(kBudget);
  for (int pass = 0; pass < 2; ++pass) EXPECT_TRUE(right(net(large_, false)));
}

TEST_P(OutOfMemoryTest, ASecondEntryPointAndNestedModulesRunAgainToo) {
  auto resident = this->resident();
  const std::vector<size_t> order = {4, 1, 1, 0};
  const at::Tensor expected = resident->run(large_, order).to(at::kCPU);
  auto [net, binding] = load();
  auto shared = engine(kBudget);
  auto offloading = apply_group_offloading(*net, binding, shared, {.gather_embeddings = false});
  leave(offloading->client().plan().peak_bytes() + activations_ - (40 << 10));
  EXPECT_TRUE(net->run(large_, order).to(at::kCPU).equal(expected));
  EXPECT_EQ(shared->report().shrinks, 1u);
}

TEST_P(OutOfMemoryTest, PassesInLockstepRunAgainTogether) {
  auto [net, binding] = load();
  auto shared = engine(kBudget);
  auto offloading = apply_group_offloading(*net, binding, shared, {.gather_embeddings = false});
  leave(offloading->client().plan().peak_bytes() + 2 * activations_ - (40 << 10));
  for (int step = 0; step < 2; ++step) {
    at::Tensor a, b;
    run_lockstep({offloading.get()},
                 {[&] { a = net(large_, false); }, [&] { b = net(large_, false); }});
    EXPECT_TRUE(right(a));
    EXPECT_TRUE(right(b));
  }
  EXPECT_GE(shared->report().shrinks, 1u);
}

TEST_P(OutOfMemoryTest, OtherErrorsAreNotTriedAgain) {
  struct Counter : nn::ModuleHook {
    int entered = 0;
    void before(nn::Module&) override { ++entered; }
  };
  auto [net, binding] = load();
  auto shared = engine(kBudget);
  auto offloading = apply_group_offloading(*net, binding, shared);
  auto counter = std::make_shared<Counter>();
  net->add_hook("counter", counter);
  EXPECT_ANY_THROW(net(at::full({1, 2}, 1000, at::kLong).to(device_), false));
  EXPECT_EQ(counter->entered, 1);
  EXPECT_EQ(shared->report().shrinks, 0u);
}

}  // namespace
}  // namespace ferry::hooks
