#include "ferry/nn/quantized_linear.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "../fixture_tensors.h"
#include "ferry/base/error.h"
#include "ferry/quant/torchao_int8.h"

namespace ferry::nn {
namespace {

using quant::Activation;
using quant::Int8Weight;
using enum QuantizedKernel;

at::Tensor random(at::IntArrayRef shape, at::ScalarType dtype, uint64_t seed) {
  return at::randn(shape, at::detail::createCPUGenerator(seed)).to(dtype);
}

struct Layer {
  Int8Weight weight;
  std::vector<at::Tensor> components;
};

Layer int8_layer(int64_t out, int64_t in, std::vector<int64_t> block,
                 Activation activation = Activation::as_is) {
  quant::Int8Components parts =
      quant::quantize_int8(random({out, in}, at::kFloat, 100 + out), block);
  return {Int8Weight({out, in}, block, true, io::Dtype::F32, activation),
          {parts.qdata, parts.scale, parts.zero_point}};
}

TEST(ChooseQuantizedKernel, ByDeviceActivationAndCpu) {
  CpuFeatures plain{.x86 = true, .max_isa = ""};
  CpuFeatures zen4{.x86 = true, .avx512_bf16 = true, .avx512_vnni = true, .max_isa = ""};
  CpuFeatures amx{.x86 = true, .avx512_bf16 = true, .amx_int8 = true, .max_isa = ""};
  CpuFeatures client{.x86 = true, .avx_vnni = true, .max_isa = ""};
  auto limited = [](CpuFeatures features, const char* isa) {
    features.max_isa = isa;
    return features;
  };
  CpuFeatures no_onednn = zen4;
  no_onednn.onednn = false;
  at::Device gpu(at::kCUDA, 0);
  QuantizedCase weight_only{.dtype = at::kBFloat16};
  QuantizedCase int8{.activation = Activation::int8_per_token,
                     .matrix = at::kChar,
                     .x_rows = 100,
                     .in_features = 64,
                     .out_features = 64,
                     .dtype = at::kBFloat16,
                     .multiplies_matrix = true};
  QuantizedCase float8 = int8;
  float8.activation = Activation::float8_per_token;
  float8.matrix = at::kFloat8_e4m3fn;
  auto with = [](QuantizedCase what, auto change) {
    change(what);
    return what;
  };
  auto on_gpu = [&](QuantizedCase what) { return with(what, [&](auto& c) { c.device = gpu; }); };

  struct Row {
    QuantizedCase what;
    CpuFeatures features;
    QuantizedKernel kernel;
    const char* reason;
  };
  const Row rows[] = {
      {weight_only, zen4, dequantize_blocks, "has instructions"},
      {weight_only, plain, upcast_blocks, "neither AVX512-BF16"},
      {with(weight_only, [](auto& c) { c.dtype = at::kHalf; }), zen4, upcast_blocks, "FP16"},
      {with(weight_only, [](auto& c) { c.dtype = at::kFloat; }), plain, dequantize_blocks,
       "float32"},
      {with(weight_only, [](auto& c) { c.dtype = at::kDouble; }), zen4, dequantize, "neither"},
      {with(weight_only, [](auto& c) { c.records_gradient = true; }), zen4, dequantize, "gradient"},
      {int8, zen4, int8_blocks, "dot products of int8"},
      {int8, amx, int8_blocks, "dot products of int8"},
      {int8, client, int8_blocks, "dot products of int8"},
      {int8, plain, int8_as_float, "no dot products"},
      {int8, no_onednn, int8_as_float, "oneDNN may not"},
      {int8, limited(zen4, "AVX512_CORE"), int8_as_float, "oneDNN may not"},
      {int8, limited(zen4, "AVX2_VNNI"), int8_as_float, "oneDNN may not"},
      {int8, limited(client, "AVX2_VNNI"), int8_blocks, "dot products of int8"},
      {int8, limited(amx, "AVX512_CORE_BF16"), int8_as_float, "oneDNN may not"},
      {int8, limited(zen4, "AVX512_CORE_VNNI"), int8_blocks, "dot products of int8"},
      {with(int8, [](auto& c) { c.records_gradient = true; }), zen4, dequantize, "gradient"},
      {with(int8, [](auto& c) { c.matrix = at::ScalarType::Undefined; }), zen4, dequantize_blocks,
       "has instructions"},
      {float8, zen4, dequantize_blocks, "has instructions"},
      {on_gpu(weight_only), zen4, dequantize, "not on a CPU"},
      {on_gpu(int8), plain, int8_mm, "multiplies int8"},
      {on_gpu(float8), plain, float8_mm, "multiplies float8"},
      {with(on_gpu(int8), [](auto& c) { c.x_rows = 16; }), zen4, dequantize, "16 rows"},
      {with(on_gpu(int8), [](auto& c) { c.in_features = 60; }), zen4, dequantize, "divisible"},
      {with(on_gpu(float8), [](auto& c) { c.out_features = 72; }), zen4, dequantize, "divisible"},
      {with(on_gpu(float8), [](auto& c) { c.dtype = at::kHalf; }), zen4, dequantize, "bfloat16"},
      {with(on_gpu(float8), [](auto& c) { c.scale_per_row = false; }), zen4, dequantize, "kinds"},
      {with(on_gpu(int8), [](auto& c) { c.multiplies_matrix = false; }), zen4, dequantize,
       "the device multiplies no such"},
      {with(on_gpu(float8), [](auto& c) { c.matrix = at::kFloat8_e5m2; }), zen4, dequantize,
       "no matrix of that type"},
  };
  for (const Row& row : rows) {
    QuantizedKernelChoice choice = choose_quantized_kernel(row.what, row.features);
    EXPECT_EQ(name(choice.kernel), name(row.kernel)) << row.reason << ", " << row.features.max_isa;
    EXPECT_THAT(std::string(choice.reason), ::testing::HasSubstr(row.reason));
  }
}

TEST(QuantizedLinear, DynamicInt8EqualsTorchaoBitForBit) {
  auto tensors = ferry::testing::read_fixture_tensors(FERRY_FIXTURES "/quant/int8.safetensors");
  for (std::string dtype : {"float32", "bfloat16", "float16"}) {
    for (std::string scale : {"row", "tensor"}) {
      for (std::string offset : {"plain", "bias"}) {
        std::string key = dtype + ".dynamic." + scale + "." + offset + ".";
        at::Tensor qdata = tensors.at(key + "qdata");
        std::vector<at::Tensor> components{qdata, tensors.at(key + "scale")};
        std::vector<int64_t> block{scale == "row" ? 1 : qdata.size(0), qdata.size(1)};
        Int8Weight weight(qdata.sizes().vec(), block, false, io::Dtype::F32,
                          Activation::int8_per_token);
        at::Tensor bias = offset == "bias" ? tensors.at(key + "bias") : at::Tensor();
        const at::Tensor &x = tensors.at(key + "x"), &expected = tensors.at(key + "y");
        // 64 columns: float32 holds the sums exactly.
        for (QuantizedKernel kernel : {int8_blocks, int8_as_float}) {
          at::Tensor y = quantized_linear_with(kernel, x, weight, components, bias);
          EXPECT_EQ(y.scalar_type(), x.scalar_type());
          EXPECT_TRUE(at::equal(y, expected)) << key << " by " << name(kernel);
        }
        // Through the dequantized weight the products are rounded earlier.
        at::Tensor rough = quantized_linear_with(dequantize, x, weight, components, bias);
        double bound = dtype == "bfloat16" ? 0.01 : 0.0015;
        EXPECT_LT(ferry::testing::relative_error(rough, expected), bound) << key;
        if (dtype == "float32") {
          EXPECT_LT(ferry::testing::relative_error(rough, expected), 1e-6);
        }
      }
    }
  }
}

// What the blocks must give: the dequantized weight, multiplied in double precision.
at::Tensor exact_product(const at::Tensor& x, const Layer& layer) {
  at::Tensor weight = layer.weight.dequantize(layer.components, x.scalar_type());
  return at::linear(x.to(at::kDouble), weight.to(at::kDouble));
}

void expect_rounded(const at::Tensor& got, const at::Tensor& exact, at::ScalarType dtype) {
  ASSERT_EQ(got.sizes(), exact.sizes());
  EXPECT_EQ(got.scalar_type(), dtype);
  EXPECT_LT(ferry::testing::relative_error(got, exact), dtype == at::kFloat ? 1e-5 : 0x1p-8);
}

TEST(QuantizedLinear, BlocksEqualTheDequantizedProduct) {
  // 9000 x 1003: more than 16 MiB in any dtype, so two blocks or more; sizes no multiple of
  // anything.
  for (const auto& block : {std::vector<int64_t>{1, 1003}, {1, 59}}) {
    Layer layer = int8_layer(9000, 1003, block);
    for (at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
      at::Tensor x = random({3, 7, 1003}, dtype, 1), bias = random({9000}, dtype, 2);
      at::Tensor exact = exact_product(x, layer);
      for (QuantizedKernel kernel : {dequantize_blocks, upcast_blocks}) {
        // The library's float16 product is a slow loop on most CPUs.
        if (kernel == dequantize_blocks && dtype == at::kHalf) continue;
        at::Tensor got = quantized_linear_with(kernel, x, layer.weight, layer.components, bias);
        expect_rounded(got, exact + bias, dtype);
      }
      expect_rounded(quantized_linear(x, layer.weight, layer.components), exact, dtype);
    }
  }
}

TEST(QuantizedLinear, RowBlocksOfTheInput) {
  // 32 MiB of float32 are 8192 rows of 1024.
  Layer layer = int8_layer(16, 1024, {1, 1024}, Activation::int8_per_token);
  at::Tensor x = random({8300, 1024}, at::kBFloat16, 3);
  at::Tensor whole = quantized_linear_with(int8_blocks, x, layer.weight, layer.components);
  at::Tensor last =
      quantized_linear_with(int8_blocks, x.narrow(0, 8200, 100), layer.weight, layer.components);
  EXPECT_TRUE(at::equal(whole.narrow(0, 8200, 100), last));
  at::Tensor floats = quantized_linear_with(int8_as_float, x, layer.weight, layer.components);
  EXPECT_LT(ferry::testing::relative_error(floats, whole), 0x1p-8);
  Layer plain = int8_layer(16, 1024, {1, 1024});
  expect_rounded(quantized_linear_with(upcast_blocks, x, plain.weight, plain.components),
                 exact_product(x, plain), at::kBFloat16);
}

TEST(QuantizedLinear, Int8ProductsAreExactInEveryBlock) {
  // Extreme values: a kernel that saturates sums of two products would show here. 4096 rows of
  // input leave blocks of 1024 columns.
  Layer layer = int8_layer(1111, 260, {1, 260}, Activation::int8_per_token);
  layer.components[0].fill_(-128);
  layer.components[0].narrow(0, 1, 500).fill_(127);
  // Scales and bias that differ from column to column and leave the numbers exact.
  at::Tensor scale = at::exp2(at::arange(1111, at::kFloat).remainder(7));
  layer.components[1].copy_(scale.unsqueeze(1));
  at::Tensor bias = at::arange(1111, at::kFloat);
  at::Tensor x = at::full({4099, 260}, 127.5, at::kFloat);
  x.narrow(0, 10, 1).neg_();
  at::Tensor qx = x.round().clamp(-128, 127);
  at::Tensor products = at::mm(qx.to(at::kDouble), layer.components[0].t().to(at::kDouble));
  at::Tensor expected = products.to(at::kFloat) * scale + bias;
  for (QuantizedKernel kernel : {int8_blocks, int8_as_float}) {
    at::Tensor got = quantized_linear_with(kernel, x, layer.weight, layer.components, bias);
    EXPECT_TRUE(at::equal(got, expected)) << name(kernel);
  }
}

TEST(QuantizedLinear, FewAndNoRowsAndStridedInputs) {
  for (Activation activation : {Activation::as_is, Activation::int8_per_token}) {
    Layer layer = int8_layer(33, 50, {1, 50}, activation);
    at::Tensor bias = random({33}, at::kBFloat16, 2);
    at::Tensor x = random({50, 40}, at::kBFloat16, 1).t();  // [40, 50], columns apart
    at::Tensor all = quantized_linear(x, layer.weight, layer.components, bias);
    EXPECT_EQ(all.sizes(), at::IntArrayRef({40, 33}));
    EXPECT_TRUE(
        at::equal(all, quantized_linear(x.contiguous(), layer.weight, layer.components, bias)));
    for (int64_t rows : {1, 2, 5}) {
      at::Tensor few = quantized_linear(x.narrow(0, 0, rows), layer.weight, layer.components, bias);
      EXPECT_LT(ferry::testing::relative_error(few, all.narrow(0, 0, rows)), 0x1p-7);
    }
    at::Tensor one = quantized_linear(x[3], layer.weight, layer.components, bias);
    EXPECT_EQ(one.sizes(), at::IntArrayRef({33}));
    at::Tensor none = at::empty({2, 0, 50}, at::kBFloat16);
    EXPECT_EQ(quantized_linear(none, layer.weight, layer.components, bias).sizes(),
              at::IntArrayRef({2, 0, 33}));
  }
}

// A matrix of float8 with a scale a row, as little as the kernels need of it.
class Float8Weight : public quant::QuantizedWeight {
 public:
  Float8Weight(std::vector<int64_t> shape, Activation activation)
      : QuantizedWeight(shape, {{"qdata", io::Dtype::F8_E4M3, shape},
                                {"scale", io::Dtype::F32, {shape[0], 1}}}),
        activation_(activation) {}
  std::string_view scheme() const override { return "float8"; }
  Activation activation() const override { return activation_; }
  at::Tensor dequantize(quant::ComponentTensors components, at::ScalarType dtype) const override {
    return (components[0].to(at::kFloat) * components[1]).to(dtype);
  }

 private:
  Activation activation_;
};

// Up to four rows go another way, in blocks that do not depend on the number of threads.
TEST(QuantizedLinear, AFewRowsAreTheFirstOfMany) {
  at::manual_seed(9);
  const int before = at::get_num_threads();
  at::Tensor weight = at::randn({200, 96}), bias = at::randn({200}), x = at::randn({9, 96});
  quant::Int8Weight description({200, 96}, {1, 96}, /*has_zero_point=*/false);
  auto made = quant::quantize_int8(weight, {1, 96});
  const std::vector<at::Tensor> components{made.qdata, made.scale};
  for (at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    at::Tensor many = quantized_linear(x.to(dtype), description, components, bias.to(dtype));
    for (int64_t rows = 1; rows <= 5; ++rows) {
      at::set_num_threads(1);
      at::Tensor few =
          quantized_linear(x.narrow(0, 0, rows).to(dtype), description, components, bias.to(dtype));
      const double bound = dtype == at::kFloat ? 1e-5 : 1e-2;
      EXPECT_TRUE(at::allclose(few.to(at::kFloat), many.narrow(0, 0, rows).to(at::kFloat), bound,
                               bound * 10))
          << rows;
      at::set_num_threads(3);
      c10::InferenceMode inference;
      if (rows < 5) {
        EXPECT_TRUE(at::equal(quantized_linear(x.narrow(0, 0, rows).to(dtype), description,
                                               components, bias.to(dtype)),
                              few))
            << rows;
      }
    }
  }
  at::set_num_threads(before);
}

TEST(QuantizedLinear, DynamicFloat8FollowsTorchao) {
  auto tensors =
      ferry::testing::read_fixture_tensors(FERRY_FIXTURES "/quant/float8_linear.safetensors");
  for (std::string granularity : {"row", "tensor"}) {
    std::string key = granularity + ".";
    at::Tensor qdata = tensors.at(key + "qdata").view(at::kFloat8_e4m3fn);
    Float8Weight weight(qdata.sizes().vec(), granularity == "row" ? Activation::float8_per_token
                                                                  : Activation::float8_per_tensor);
    std::vector<at::Tensor> components{qdata, tensors.at(key + "scale").expand({qdata.size(0), 1})};
    at::Tensor y = quantized_linear(tensors.at(key + "x"), weight, components);
    const at::Tensor& expected = tensors.at(key + "y");
    EXPECT_LT(ferry::testing::relative_error(y, expected), 0x1.8p-8) << granularity;
    // Without the quantization of the input it is further away.
    at::Tensor plain =
        at::linear(tensors.at(key + "x"), weight.dequantize(components, at::kBFloat16));
    EXPECT_GT(ferry::testing::relative_error(plain, expected), 0x1.8p-8) << granularity;
    at::Tensor zeros = quantized_linear(at::zeros_like(tensors.at(key + "x")), weight, components);
    EXPECT_TRUE(at::equal(zeros, at::zeros_like(zeros)));
  }
}

TEST(QuantizedLinear, PassesGradientsToItsInput) {
  c10::AutoGradMode enabled(true);
  for (Activation activation : {Activation::as_is, Activation::int8_per_token}) {
    Layer layer = int8_layer(5, 8, {1, 8}, activation);
    at::Tensor x = random({2, 8}, at::kFloat, 1).requires_grad_();
    quantized_linear(x, layer.weight, layer.components).sum().backward();
    at::Tensor expected = layer.weight.dequantize(layer.components, at::kFloat).sum(0);
    EXPECT_TRUE(at::allclose(x.grad(), expected.expand({2, 8})));
  }
}

TEST(QuantizedLinear, TheSameBitsWhereverTheComponentsLie) {
  // As after a group was streamed again: other memory, the same numbers.
  for (Activation activation : {Activation::as_is, Activation::int8_per_token}) {
    Layer layer = int8_layer(257, 320, {1, 320}, activation);
    at::Tensor x = random({70, 320}, at::kBFloat16, 4);
    at::Tensor first = quantized_linear(x, layer.weight, layer.components);
    std::vector<at::Tensor> moved;
    for (const at::Tensor& component : layer.components) {
      at::Tensor bytes = at::empty({static_cast<int64_t>(component.nbytes()) + 4}, at::kByte);
      moved.push_back(bytes.narrow(0, 4, static_cast<int64_t>(component.nbytes()))
                          .view(component.scalar_type())
                          .view(component.sizes())
                          .copy_(component));
    }
    EXPECT_TRUE(at::equal(first, quantized_linear(x, layer.weight, moved)));
  }
}

TEST(QuantizedLinear, ScratchIsBoundedAndKernelsRefuseOtherWeights) {
  EXPECT_EQ(scratch_bytes(1), 16 << 20);
  EXPECT_EQ(scratch_bytes(8), 16 << 20);
  EXPECT_EQ(scratch_bytes(64), 128 << 20);
  Layer layer = int8_layer(5, 8, {1, 8});
  EXPECT_THROW(quantized_linear_with(int8_blocks, at::ones({2, 8}), layer.weight, layer.components),
               ArgumentError);
}

}  // namespace
}  // namespace ferry::nn
