#include "ferry/nn/attention_dispatch.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "ferry/base/error.h"

namespace ferry::nn {
namespace {

at::Tensor values(at::IntArrayRef shape, double seed) {
  int64_t count = c10::multiply_integers(shape);
  return at::sin(at::arange(count, at::kDouble) * 1.7 + seed).view(shape).to(at::kFloat);
}

// softmax(q k^T scale + mask) v, one query row at a time.
at::Tensor brute_force(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale,
                       const at::Tensor& additive, bool causal) {
  at::Tensor out = at::zeros(q.sizes(), at::kDouble);
  int64_t repeats = q.size(2) / k.size(2);
  for (int64_t b = 0; b < q.size(0); ++b)
    for (int64_t h = 0; h < q.size(2); ++h)
      for (int64_t i = 0; i < q.size(1); ++i) {
        at::Tensor keys = k[b].select(1, h / repeats).to(at::kDouble);
        at::Tensor scores = at::mv(keys, q[b][i][h].to(at::kDouble)) * scale;
        if (additive.defined()) scores = scores + additive[b];
        if (causal) scores = scores.masked_fill(at::arange(k.size(1)) > i, -1e300);
        at::Tensor weights = at::softmax(scores, 0);
        out[b][i][h] = at::mv(v[b].select(1, h / repeats).to(at::kDouble).t(), weights);
      }
  return out;
}

struct Inputs {
  at::Tensor q = values({2, 5, 4, 8}, 0), k = values({2, 7, 4, 8}, 1), v = values({2, 7, 4, 8}, 2);
};

double error(const at::Tensor& got, const at::Tensor& expected) {
  EXPECT_EQ(got.sizes(), expected.sizes());
  return (got.to(at::kDouble) - expected).abs().max().item<double>();
}

TEST(DispatchAttention, EveryBackendOfTheCpuAgreesWithTheFormula) {
  Inputs in;
  at::Tensor keep = at::ones({2, 7}, at::kBool);
  keep[0].slice(0, 4).fill_(false);
  at::Tensor additive = at::zeros({2, 7}, at::kDouble).masked_fill(keep.logical_not(), -1e300);
  for (AttentionBackend backend :
       {AttentionBackend::native, AttentionBackend::math, AttentionBackend::flash}) {
    SCOPED_TRACE(attention_backend_name(backend));
    AttentionOptions options{.backend = backend};
    EXPECT_LT(error(dispatch_attention(in.q, in.k, in.v, options),
                    brute_force(in.q, in.k, in.v, 1 / std::sqrt(8.0), {}, false)),
              1e-6);
    options.scale = 0.7;
    options.mask = keep;
    EXPECT_LT(error(dispatch_attention(in.q, in.k, in.v, options),
                    brute_force(in.q, in.k, in.v, 0.7, additive, false)),
              1e-6);
    // The same as an additive mask of all dimensions.
    options.mask = additive.clamp(-1e30).to(at::kFloat).view({2, 1, 1, 7}).expand({2, 4, 5, 7});
    EXPECT_LT(error(dispatch_attention(in.q, in.k, in.v, options),
                    brute_force(in.q, in.k, in.v, 0.7, additive, false)),
              1e-6);
    options = {.is_causal = true, .backend = backend};
    EXPECT_LT(error(dispatch_attention(in.q, in.k, in.v, options),
                    brute_force(in.q, in.k, in.v, 1 / std::sqrt(8.0), {}, true)),
              1e-6);
    options = {.enable_gqa = true, .backend = backend};
    at::Tensor k = in.k.slice(2, 0, 2), v = in.v.slice(2, 0, 2);
    EXPECT_LT(error(dispatch_attention(in.q, k, v, options),
                    brute_force(in.q, k, v, 1 / std::sqrt(8.0), {}, false)),
              1e-6);
  }
}

TEST(DispatchAttention, HalfPrecisionKeepsItsDtype) {
  Inputs in;
  at::Tensor expected = brute_force(in.q, in.k, in.v, 1 / std::sqrt(8.0), {}, false);
  for (at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    at::Tensor out = dispatch_attention(in.q.to(dtype), in.k.to(dtype), in.v.to(dtype));
    EXPECT_EQ(out.scalar_type(), dtype);
    EXPECT_LT(error(out, expected), 0.02);
  }
}

TEST(DispatchAttention, RefusesWhatDoesNotFit) {
  Inputs in;
  EXPECT_THROW(dispatch_attention(in.q, in.k.slice(2, 0, 2), in.v.slice(2, 0, 2)), ArgumentError)
      << "heads";
  EXPECT_THROW(dispatch_attention(in.q, in.k.slice(1, 0, 3), in.v), ArgumentError) << "tokens";
  EXPECT_THROW(dispatch_attention(in.q, in.k.to(at::kHalf), in.v), ArgumentError) << "dtypes";
  EXPECT_THROW(dispatch_attention(in.q, in.k, in.v, {.mask = at::zeros({2, 6})}), ArgumentError);
  EXPECT_THROW(dispatch_attention(in.q, in.k, in.v, {.backend = AttentionBackend::cudnn}),
               ArgumentError);
}

TEST(AttentionBackend, Names) {
  for (AttentionBackend backend :
       {AttentionBackend::native, AttentionBackend::math, AttentionBackend::flash,
        AttentionBackend::efficient, AttentionBackend::cudnn}) {
    EXPECT_EQ(parse_attention_backend(std::string(attention_backend_name(backend))), backend);
  }
  EXPECT_EQ(parse_attention_backend("math"), AttentionBackend::math);
  try {
    parse_attention_backend("sage");
    FAIL();
  } catch (const ArgumentError& error) {
    EXPECT_THAT(error.what(), ::testing::HasSubstr("_native_flash"));
  }
}

TEST(AttentionBackend, Constraints) {
  struct Row {
    AttentionBackend asked;
    AttentionFacts facts;
    const char* obstacle;  // null: usable
  };
  using enum AttentionBackend;
  const Row rows[] = {
      {native, {at::kCPU, at::kFloat, 64, true, false}, nullptr},
      {flash, {at::kCPU, at::kFloat, 40, true, false}, nullptr},
      {efficient, {at::kCPU, at::kFloat, 64, false, false}, "no kernel for the device 'cpu'"},
      {flash, {at::kCUDA, at::kFloat, 64, false, false}, "bfloat16 or float16"},
      {flash, {at::kCUDA, at::kBFloat16, 64, true, false}, "no mask"},
      {flash, {at::kCUDA, at::kBFloat16, 512, false, false}, "up to 256"},
      {flash, {at::kCUDA, at::kBFloat16, 36, false, false}, "multiples of 8"},
      {flash, {at::kCUDA, at::kHalf, 128, false, true}, nullptr},
      {efficient, {at::kCUDA, at::kFloat, 512, true, false}, nullptr},
      {cudnn, {at::kCUDA, at::kBFloat16, 128, true, false}, nullptr},
      {math, {at::kPrivateUse1, at::kFloat, 64, false, false}, nullptr},
      {flash, {at::kPrivateUse1, at::kFloat, 64, false, false}, "no kernel for the device"},
      {math, {at::kCPU, at::kFloat, 64, true, true}, "exclude each other"},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(std::string(attention_backend_name(row.asked)) +
                 (row.obstacle ? row.obstacle : ""));
    try {
      EXPECT_EQ(choose_attention_backend(row.asked, row.facts).effective, row.asked);
      EXPECT_EQ(row.obstacle, nullptr);
    } catch (const ArgumentError& error) {
      ASSERT_NE(row.obstacle, nullptr) << error.what();
      EXPECT_THAT(error.what(), ::testing::HasSubstr(row.obstacle));
    }
  }
  AttentionChoice choice =
      choose_attention_backend(std::nullopt, {at::kPrivateUse1, at::kFloat, 64, false, false});
  EXPECT_EQ(choice.requested, native);
  EXPECT_EQ(choice.effective, math);
}

}  // namespace
}  // namespace ferry::nn
