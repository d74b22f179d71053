#include "ferry/nn/linear_kernels.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace ferry::nn {
namespace {

TEST(ChooseLinearKernel, ByCpuAndLimit) {
  constexpr auto bf16 = at::kBFloat16, fp16 = at::kHalf;
  CpuFeatures laptop{.x86 = true, .max_isa = ""};
  CpuFeatures zen4{.x86 = true, .avx512_bf16 = true, .max_isa = ""};
  CpuFeatures sapphire_rapids{.x86 = true, .avx512_bf16 = true, .avx512_fp16 = true, .max_isa = ""};
  CpuFeatures arrow_lake{.x86 = true, .avx_ne_convert = true, .max_isa = ""};
  CpuFeatures arm{.arm_bf16 = true, .arm_fp16 = true, .max_isa = ""};
  auto limited = [](CpuFeatures features, const char* isa) {
    features.max_isa = isa;
    return features;
  };
  CpuFeatures no_onednn = sapphire_rapids;
  no_onednn.onednn = false;

  struct Row {
    CpuFeatures features;
    at::ScalarType dtype;
    LinearKernel kernel;
    const char* reason;
  };
  using enum LinearKernel;
  const Row rows[] = {
      {laptop, bf16, upcast_blocks, "neither AVX512-BF16"},
      {laptop, fp16, upcast_blocks, "neither AVX512-FP16"},
      {laptop, at::kFloat, native, "neither bfloat16 nor float16"},
      {zen4, bf16, native, "has instructions"},
      {zen4, fp16, upcast_blocks, "neither AVX512-FP16"},
      {sapphire_rapids, fp16, native, "has instructions"},
      {limited(sapphire_rapids, "AVX2"), bf16, upcast_blocks, "ONEDNN_MAX_CPU_ISA"},
      {limited(sapphire_rapids, "AVX512_CORE_VNNI"), bf16, upcast_blocks, "ONEDNN_MAX_CPU_ISA"},
      {limited(sapphire_rapids, "AVX512_CORE_BF16"), bf16, native, "has instructions"},
      {limited(sapphire_rapids, "AVX512_CORE_BF16"), fp16, upcast_blocks, "ONEDNN_MAX_CPU_ISA"},
      {limited(sapphire_rapids, "AVX512_CORE_AMX"), fp16, native, "has instructions"},
      {limited(sapphire_rapids, "DEFAULT"), bf16, native, "has instructions"},
      {arrow_lake, bf16, native, "has instructions"},
      {limited(arrow_lake, "AVX2_VNNI"), bf16, upcast_blocks, "ONEDNN_MAX_CPU_ISA"},
      {limited(arrow_lake, "AVX2_VNNI_2"), bf16, native, "has instructions"},
      {no_onednn, bf16, upcast_blocks, "oneDNN is disabled"},
      {arm, bf16, native, "has instructions"},
      {CpuFeatures{}, bf16, upcast_blocks, "no instructions"},
  };
  for (const Row& row : rows) {
    LinearKernelChoice choice = choose_linear_kernel(at::Device(at::kCPU), row.dtype, row.features);
    EXPECT_EQ(choice.kernel, row.kernel) << row.reason << ", limit " << row.features.max_isa;
    EXPECT_THAT(std::string(choice.reason), ::testing::HasSubstr(row.reason));
  }
  EXPECT_EQ(choose_linear_kernel(at::Device(at::kCUDA, 0), bf16, laptop).kernel, native);
}

at::Tensor values(at::IntArrayRef shape, at::ScalarType dtype, double seed) {
  int64_t count = c10::multiply_integers(shape);
  return at::sin(at::arange(count, at::kDouble) * 2.3 + seed).view(shape).to(dtype);
}

// Half a unit in the last place of what double precision gives, with a little for float32 sums.
void expect_rounded_once(const at::Tensor& got, const at::Tensor& exact) {
  ASSERT_EQ(got.sizes(), exact.sizes());
  double unit = got.scalar_type() == at::kBFloat16 ? 0x1p-8 : 0x1p-11;
  at::Tensor error = (got.to(at::kDouble) - exact).abs();
  EXPECT_LE((error / (exact.abs() + 1e-3)).max().item<double>(), unit * 1.05);
}

TEST(LinearUpcastBlocks, RoundsTheExactProductOnce) {
  for (at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    // 6000 inputs: several blocks of weights (4 MiB) and, with 1500 rows, of the input (32 MiB).
    at::Tensor x = values({3, 500, 6000}, dtype, 0), w = values({400, 6000}, dtype, 1),
               b = values({400}, dtype, 2);
    at::Tensor exact = at::linear(x.to(at::kDouble), w.to(at::kDouble), b.to(at::kDouble));
    at::Tensor got = linear_upcast_blocks(x, w, b);
    EXPECT_EQ(got.scalar_type(), dtype);
    double scale = exact.abs().max().item<double>();
    EXPECT_LT((got.to(at::kDouble) - exact).abs().max().item<double>() / scale, 0x1p-8);
    at::Tensor small = values({7, 5}, dtype, 3), kernel = values({3, 5}, dtype, 4);
    expect_rounded_once(linear_upcast_blocks(small, kernel, {}),
                        at::linear(small.to(at::kDouble), kernel.to(at::kDouble)));
    expect_rounded_once(linear_upcast_blocks(small[0], kernel, {}),
                        at::linear(small[0].to(at::kDouble), kernel.to(at::kDouble)));
  }
}

TEST(Conv2dUpcastBlocks, EqualsTheConvolutionInOnePiece) {
  struct Row {
    int64_t in, out, height, width, kernel;
    Conv2dGeometry geometry;
  };
  const Row rows[] = {
      {4, 6, 9, 7, 3, {1, 1, 1, 1}},        {4, 6, 9, 8, 3, {2, 0, 1, 2}},
      {4, 4, 11, 7, 3, {1, 2, 2, 1}},       {3, 5, 6, 6, 1, {1, 0, 1, 1}},
      {64, 64, 300, 500, 3, {1, 1, 1, 1}},  // several stripes
      {64, 64, 301, 500, 3, {2, 1, 1, 64}},
  };
  for (const Row& row : rows) {
    at::Tensor x = values({2, row.in, row.height, row.width}, at::kBFloat16, 0);
    at::Tensor w =
        values({row.out, row.in / row.geometry.groups, row.kernel, row.kernel}, at::kBFloat16, 1);
    at::Tensor b = values({row.out}, at::kBFloat16, 2);
    at::Tensor got = conv2d_upcast_blocks(x, w, b, row.geometry);
    const auto& g = row.geometry;
    at::Tensor expected =
        at::conv2d(x.to(at::kFloat), w.to(at::kFloat), b.to(at::kFloat), {g.stride, g.stride},
                   {g.padding, g.padding}, {g.dilation, g.dilation}, g.groups);
    ASSERT_EQ(got.sizes(), expected.sizes());
    double scale = expected.abs().max().item<double>();
    EXPECT_LT((got.to(at::kFloat) - expected).abs().max().item<double>() / scale, 0x1p-8)
        << row.height;
  }
}

TEST(Linear, TrainsThroughBothKernels) {
  at::Tensor x = values({2, 5}, at::kBFloat16, 0).requires_grad_(),
             w = values({3, 5}, at::kBFloat16, 1).requires_grad_();
  c10::AutoGradMode enabled(true);
  nn::linear(x, w).sum().backward();
  EXPECT_TRUE(at::allclose(x.grad().to(at::kFloat), w.detach().sum(0).to(at::kFloat).expand({2, 5}),
                           0.02, 0.02));
}

// A streamed weight lies at its file's offset, of which only the item's size is a divisor.
TEST(Linear, IsTheSameWhereverTheWeightLies) {
  at::manual_seed(5);
  for (at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    for (int64_t rows : {1, 2, 7, 64}) {
      for (auto [out, in] : {std::pair<int64_t, int64_t>{24, 16}, {96, 24}, {64, 384}}) {
        at::Tensor weight = at::randn({out, in}).to(dtype), x = at::randn({rows, in}).to(dtype);
        at::Tensor bias = at::randn({out}).to(dtype);
        at::Tensor expected = linear(x, weight, bias);
        at::Tensor space = at::empty({weight.numel() + 64}, weight.options());
        for (int64_t shift = 1; shift < 32; shift += 3) {
          at::Tensor moved = space.narrow(0, shift, weight.numel()).view({out, in}).copy_(weight);
          EXPECT_TRUE(at::equal(linear(x, moved, bias), expected))
              << dtype << " [" << out << ", " << in << "], " << rows << " rows, shift " << shift;
        }
      }
    }
  }
}

TEST(Linear, OneRowOfFloat32KeepsShapeAndGradient) {
  at::manual_seed(6);
  at::Tensor weight = at::randn({5, 3}), bias = at::randn({5});
  at::Tensor x = at::randn({1, 1, 3}).requires_grad_();
  at::Tensor out = linear(x, weight, bias);
  EXPECT_EQ(out.sizes(), at::IntArrayRef({1, 1, 5}));
  EXPECT_TRUE(at::allclose(out, at::linear(x, weight, bias), 1e-6, 1e-6));
  out.sum().backward();
  EXPECT_TRUE(at::allclose(x.grad().view({3}), weight.sum(0), 1e-6, 1e-6));
}

}  // namespace
}  // namespace ferry::nn
