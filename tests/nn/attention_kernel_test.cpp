#include "ferry/nn/attention_kernel.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "ferry/nn/attention_dispatch.h"

namespace ferry::nn {
namespace {

class AttentionKernel : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_bf16_attention()) GTEST_SKIP() << "not a CPU that it is for";
    at::manual_seed(7);
  }
  // [batch, heads, tokens, dim], laid out as a model has it.
  static at::Tensor random(int64_t batch, int64_t heads, int64_t tokens, int64_t dim) {
    return at::randn({batch, tokens, heads, dim}).to(at::kBFloat16).permute({0, 2, 1, 3});
  }
  static at::Tensor formula(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            double scale) {
    const at::Tensor scores = at::matmul(q.to(at::kDouble), k.to(at::kDouble).mT()) * scale;
    return at::matmul(at::softmax(scores, -1), v.to(at::kDouble));
  }
  static double mean_error(const at::Tensor& got, const at::Tensor& expected) {
    return (got.to(at::kDouble) - expected).abs().mean().item<double>();
  }
};

// Blocks of rows and what is left over, an odd number of keys, few and many channels.
TEST_F(AttentionKernel, AsCloseToTheFormulaAsTheLibrarysFlashKernel) {
  struct Shape {
    int64_t batch, heads, tokens, keys, dim;
  };
  for (const Shape& s :
       {Shape{1, 1, 1, 1, 2}, Shape{2, 3, 5, 7, 8}, Shape{1, 2, 300, 1301, 64},
        Shape{2, 1, 129, 128, 128}, Shape{1, 1, 40, 20001, 6}, Shape{1, 1, 33, 65, 512}}) {
    SCOPED_TRACE(testing::Message() << s.tokens << " x " << s.keys << " x " << s.dim);
    const at::Tensor q = random(s.batch, s.heads, s.tokens, s.dim) * 2;
    const at::Tensor k = random(s.batch, s.heads, s.keys, s.dim);
    const at::Tensor v = random(s.batch, s.heads, s.keys, s.dim);
    const at::Tensor expected = formula(q, k, v, 1 / std::sqrt(static_cast<double>(s.dim)));
    const at::Tensor got = attention_on_cpu(q, k, v);
    ASSERT_EQ(got.sizes(), q.sizes());
    ASSERT_EQ(got.scalar_type(), at::kBFloat16);
    const at::Tensor theirs =
        std::get<0>(at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, false));
    EXPECT_LE(mean_error(got, expected), 1.02 * mean_error(theirs, expected) + 1e-4);
    EXPECT_TRUE(at::allclose(got.to(at::kDouble), expected, 2e-2, 2e-2));
    EXPECT_TRUE(at::allclose(attention_on_cpu(q, k, v, 0.3).to(at::kDouble), formula(q, k, v, 0.3),
                             2e-2, 2e-2));
  }
}

TEST_F(AttentionKernel, AnyLayout) {
  const at::Tensor q = random(1, 2, 9, 16), k = random(1, 2, 11, 16), v = random(1, 2, 11, 16);
  const at::Tensor expected = attention_on_cpu(q, k, v);
  auto channels_first = [](const at::Tensor& x) { return x.mT().contiguous().mT(); };
  EXPECT_TRUE(
      attention_on_cpu(channels_first(q), channels_first(k), channels_first(v)).equal(expected));
  // Keys that begin at an odd element.
  at::Tensor odd = at::empty({k.numel() + 1}, k.options());
  odd.narrow(0, 1, k.numel()).copy_(k.reshape({-1}));
  EXPECT_TRUE(attention_on_cpu(q, odd.narrow(0, 1, k.numel()).view(k.sizes()), v).equal(expected));
}

TEST_F(AttentionKernel, NeitherThreadsNorOtherHeadsChangeARow) {
  const at::Tensor q = random(1, 5, 300, 64), k = random(1, 5, 77, 64), v = random(1, 5, 77, 64);
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const at::Tensor expected = attention_on_cpu(q, k, v);
  const at::Tensor alone =
      attention_on_cpu(q.narrow(1, 3, 1), k.narrow(1, 3, 1), v.narrow(1, 3, 1));
  at::set_num_threads(3);
  EXPECT_TRUE(attention_on_cpu(q, k, v).equal(expected));
  EXPECT_TRUE(alone.equal(expected.narrow(1, 3, 1)));
  at::set_num_threads(before);
}

TEST_F(AttentionKernel, WhatCallsForIt) {
  const at::Tensor q = random(1, 2, 70, 32), k = random(1, 2, 90, 32), v = random(1, 2, 90, 32);
  std::array<at::Tensor, 3> tokens_first;
  for (int i = 0; i < 3; ++i) tokens_first[i] = std::array{q, k, v}[i].permute({0, 2, 1, 3});
  auto dispatch = [&](const AttentionOptions& options) {
    return dispatch_attention(tokens_first[0], tokens_first[1], tokens_first[2], options)
        .permute({0, 2, 1, 3});
  };
  const at::Tensor expected = attention_on_cpu(q, k, v);
  EXPECT_TRUE(dispatch({}).equal(expected));
  EXPECT_TRUE(dispatch({.backend = AttentionBackend::flash}).equal(expected));
  const at::Tensor mask = at::ones({1, 90}, at::kBool);
  EXPECT_TRUE(at::allclose(dispatch({.mask = mask}), expected, 2e-2, 2e-2));
  tokens_first[0].requires_grad_(true);
  const at::Tensor with_gradient = dispatch({});
  EXPECT_TRUE(with_gradient.requires_grad());
  EXPECT_TRUE(at::allclose(with_gradient, expected, 2e-2, 2e-2));
}

}  // namespace
}  // namespace ferry::nn
