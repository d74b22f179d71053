#include "ferry/weights/weights_state.h"

#include <gtest/gtest.h>

#include "../io/temp_folder.h"
#include "ferry/weights/stub.h"
#include "stored_fixture.h"

namespace ferry::weights {
namespace {

class Two : public torch::nn::Module {
 public:
  Two() {
    register_parameter("a", make_stub({2, 2}, at::kFloat), /*requires_grad=*/false);
    register_parameter("b", make_stub({3}, at::kFloat), /*requires_grad=*/false);
  }
  at::Tensor slot(const char* name) { return named_parameters()[name]; }
};

class State : public ::testing::Test {
 protected:
  State() {
    write_checkpoint(folder_ / "model.safetensors",
                     {{"a", at::ones({2, 2})}, {"b", at::ones({3})}});
    binding_ = weights::bind(module_, Checkpoint::open_file(folder_ / "model.safetensors"));
  }
  WeightsState now() { return WeightsState(module_, binding_.get()); }
  void read() { load_resident(*binding_, *io::make_read_engine()); }

  testing_io::TempFolder folder_;
  Two module_;
  std::shared_ptr<Binding> binding_;
};

TEST_F(State, WhatWasReadIsWhatTheSourceHolds) {
  const WeightsState stubs = now();
  EXPECT_EQ(now(), stubs);
  read();
  EXPECT_EQ(now(), stubs);
  EXPECT_NE(WeightsState(), stubs);
}

TEST_F(State, AChangeInPlaceIsAnotherState) {
  read();
  const WeightsState before = now();
  module_.slot("b").mul_(2);
  const WeightsState changed = now();
  EXPECT_NE(changed, before);
  EXPECT_EQ(now(), changed);
  module_.slot("b").mul_(2);
  EXPECT_NE(now(), changed);
}

TEST_F(State, OtherDataIsAnotherStateAlsoAtTheSameAddress) {
  read();
  std::vector<WeightsState> seen = {now()};
  for (int i = 0; i < 8; ++i) {
    // The allocator is likely to give the same bytes again.
    module_.slot("b").set_data(make_stub({3}, at::kFloat));
    module_.slot("b").set_data(at::full({3}, i));
    for (const WeightsState& state : seen) EXPECT_NE(now(), state) << i;
    seen.push_back(now());
  }
}

TEST_F(State, AnotherDtypeOrSourceIsAnotherState) {
  const WeightsState before = now();
  module_.slot("a").set_data(make_stub({2, 2}, at::kBFloat16));
  EXPECT_NE(now(), before);
  module_.slot("a").set_data(make_stub({2, 2}, at::kFloat));
  EXPECT_EQ(now(), before);
  std::swap(binding_->slots[0].source.offset, binding_->slots[1].source.offset);
  EXPECT_NE(now(), before);
}

TEST_F(State, WhoMovesWeightsSaysWhatTheyStandFor) {
  const WeightsState before = now();
  module_.slot("a").set_data(at::ones({2, 2}));  // as in an arena
  EXPECT_NE(now(), before);
  EXPECT_EQ(WeightsState(module_, binding_.get(), [](const BoundSlot&) { return true; }), before);
}

}  // namespace
}  // namespace ferry::weights
