#include "ferry/weights/slot.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/nn/module.h>

#include "ferry/weights/stub.h"

namespace ferry::weights {
namespace {

TEST(Stub, IsLoudAndSmallInEveryFloatType) {
  for (at::ScalarType dtype :
       {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16, at::kFloat8_e4m3fn, at::kFloat8_e5m2}) {
    at::Tensor stub = make_stub({3, 1000, 1000}, dtype);
    EXPECT_EQ(stub.sizes(), (std::vector<int64_t>{3, 1000, 1000}));
    EXPECT_EQ(stub.scalar_type(), dtype);
    EXPECT_LT(stub.storage().nbytes(), 64u);
    EXPECT_TRUE(at::isnan(stub.narrow(0, 0, 1).narrow(1, 0, 1).to(at::kFloat)).all().item<bool>())
        << dtype;
    EXPECT_TRUE(is_stub(stub));
  }
  EXPECT_EQ(make_stub({2}, at::kLong)[1].item<int64_t>(), std::numeric_limits<int64_t>::min());
  EXPECT_TRUE(is_stub(make_stub({}, at::kFloat)));
}

TEST(Stub, RealTensorsAreNone) {
  EXPECT_FALSE(is_stub(at::zeros({1})));
  EXPECT_FALSE(is_stub(at::zeros({})));
  EXPECT_FALSE(is_stub(at::zeros({1}).expand({5})));
  EXPECT_FALSE(is_stub(at::zeros({6})));  // as many bytes as a stub's storage
  EXPECT_FALSE(is_stub(at::Tensor()));
}

TEST(Stub, TakesDataBothWaysAndKeepsIdentity) {
  at::Tensor slot = make_stub({2, 2}, at::kFloat);
  const c10::TensorImpl* identity = slot.unsafeGetTensorImpl();
  slot.set_data(at::ones({2, 2}).to(at::kBFloat16));
  EXPECT_FALSE(is_stub(slot));
  EXPECT_EQ(slot.scalar_type(), at::kBFloat16);
  slot.set_data(make_stub({2, 2}, at::kFloat));
  EXPECT_TRUE(is_stub(slot));
  EXPECT_EQ(slot.unsafeGetTensorImpl(), identity);
}

struct Leaf : torch::nn::Module {
  at::Tensor weight = register_parameter("weight", at::zeros({4, 2}));
  at::Tensor running = register_buffer("running", at::zeros({3}));
};
struct Root : torch::nn::Module {
  at::Tensor scale = register_parameter("scale", at::zeros({5}));
  std::shared_ptr<Leaf> first = register_module("first", std::make_shared<Leaf>());
  std::shared_ptr<Leaf> second = register_module("second", std::make_shared<Leaf>());
};

TEST(Slots, ComeInOrderAndTiedOnesOnce) {
  Root root;
  root.second->parameters();
  std::vector<std::string> names;
  for (const Slot& slot : collect_slots(root)) names.push_back(slot.name());
  EXPECT_EQ(names, (std::vector<std::string>{"scale", "first.weight", "first.running",
                                             "second.weight", "second.running"}));
  EXPECT_EQ(total_bytes(collect_slots(root)), 4u * (5 + 8 + 3 + 8 + 3));

  struct Tied : torch::nn::Module {
    explicit Tied(Root& root) {
      register_parameter("a", root.scale);
      register_parameter("b", root.scale);
    }
  } tied(root);
  std::vector<Slot> slots = collect_slots(tied);
  ASSERT_EQ(slots.size(), 1u);
  EXPECT_EQ(slots[0].names, (std::vector<std::string>{"a", "b"}));
}

}  // namespace
}  // namespace ferry::weights
