// Operations on the fake accelerator equal the CPU's, bit for bit, without the host waiting.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <functional>

#include "ferry/testing/fake_accelerator.h"

namespace ferry::testing {
namespace {

using Tensors = std::vector<at::Tensor>;

struct Case {
  std::string name;
  std::vector<std::vector<int64_t>> shapes;  // of random inputs
  std::function<Tensors(const Tensors&)> run;
};

Tensors ids(const at::Tensor& like, at::IntArrayRef shape, int64_t below) {
  at::Tensor on_device = at::arange(shape[0] * shape[1], like.options().dtype(at::kLong));
  return {on_device.view(shape).remainder(below)};
}

at::Tensor convolve(const at::Tensor& x, const at::Tensor& weight,
                    const std::optional<at::Tensor>& bias,
                    const std::vector<int64_t>& stride = {1, 1},
                    const std::vector<int64_t>& padding = {0, 0}, int64_t groups = 1) {
  return at::conv2d(x, weight, bias, at::IntArrayRef(stride), at::IntArrayRef(padding),
                    at::IntArrayRef({1, 1}), groups);
}

// What the forwards of ferry's models call, and what users of tensors do around them.
const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {"linear",
       {{2, 5, 16}, {24, 16}, {24}},
       [](const Tensors& in) -> Tensors { return {at::linear(in[0], in[1], in[2])}; }},
      {"linear without bias",
       {{2, 5, 16}, {24, 16}},
       [](const Tensors& in) -> Tensors { return {at::linear(in[0], in[1])}; }},
      {"linear of a transposed input",
       {{16, 5, 2}, {24, 16}, {24}},
       [](const Tensors& in) -> Tensors {
         return {at::linear(in[0].permute({2, 1, 0}), in[1], in[2])};
       }},
      {"addmm and mm",
       {{4}, {3, 8}, {8, 4}},
       [](const Tensors& in) -> Tensors {
         return {at::addmm(in[0], in[1], in[2]), at::mm(in[1], in[2]), at::matmul(in[1], in[2])};
       }},
      {"bmm",
       {{3, 4, 8}, {3, 8, 5}},
       [](const Tensors& in) -> Tensors { return {at::bmm(in[0], in[1])}; }},
      {"layer_norm",
       {{2, 7, 16}, {16}, {16}},
       [](const Tensors& in) -> Tensors {
         return {at::layer_norm(in[0], {16}, in[1], in[2], 1e-6), at::layer_norm(in[0], {16})};
       }},
      {"rms_norm",
       {{2, 7, 3, 16}, {16}},
       [](const Tensors& in) -> Tensors {
         return {at::rms_norm(in[0], {16}, in[1], 1e-6), at::rms_norm(in[0], {16}),
                 at::rms_norm(in[0].transpose(1, 2), {16}, in[1], 1e-6)};
       }},
      {"group_norm",
       {{2, 8, 6, 5}, {8}, {8}},
       [](const Tensors& in) -> Tensors {
         return {at::group_norm(in[0], 4, in[1], in[2], 1e-6),
                 at::group_norm(in[0].flatten(2), 4, in[1], in[2], 1e-6),
                 at::group_norm(in[0].contiguous(at::MemoryFormat::ChannelsLast), 4, in[1], in[2])};
       }},
      {"attention",
       {{2, 3, 9, 8}, {2, 3, 11, 8}, {2, 3, 11, 8}, {2, 1, 9, 11}},
       [](const Tensors& in) -> Tensors {
         return {at::scaled_dot_product_attention(in[0], in[1], in[2]),
                 at::scaled_dot_product_attention(in[0], in[1], in[2], in[3], 0.0, false, 1.0),
                 at::scaled_dot_product_attention(in[0], in[1], in[2], in[3] > 0),
                 std::get<0>(at::_scaled_dot_product_attention_math(in[0], in[1], in[2]))};
       }},
      {"causal attention of permuted tensors",
       {{2, 9, 3, 8}},
       [](const Tensors& in) -> Tensors {
         at::Tensor x = in[0].permute({0, 2, 1, 3});
         return {at::scaled_dot_product_attention(x, x, x, {}, 0.0, true)};
       }},
      {"conv2d",
       {{2, 4, 9, 10}, {6, 4, 3, 3}, {6}},
       [](const Tensors& in) -> Tensors {
         return {convolve(in[0], in[1], in[2], {1, 1}, {1, 1}),
                 convolve(in[0], in[1], {}, {2, 2}, {0, 1}),
                 at::convolution(in[0], in[1], in[2], {1, 1}, {2, 2}, {2, 2}, false, {0, 0}, 1),
                 convolve(in[0].contiguous(at::MemoryFormat::ChannelsLast), in[1], in[2])};
       }},
      {"conv2d of groups, kernel 1",
       {{2, 4, 5, 5}, {6, 2, 1, 1}, {6}},
       [](const Tensors& in) -> Tensors {
         return {convolve(in[0], in[1], in[2], {1, 1}, {0, 0}, 2)};
       }},
      {"transposed convolution",
       {{2, 4, 5, 5}, {4, 3, 3, 3}},
       [](const Tensors& in) -> Tensors {
         return {at::convolution(in[0], in[1], {}, {2, 2}, {1, 1}, {1, 1}, true, {1, 1}, 1)};
       }},
      {"arithmetic",
       {{2, 5, 16}, {2, 1, 16}},
       [](const Tensors& in) -> Tensors {
         return {in[0] + in[1],
                 in[0] * (in[1] + 1),
                 in[0] - 2,
                 in[0] / 3,
                 1 - in[0],
                 -in[0],
                 in[0] * at::scalar_tensor(2.5),
                 in[0].clone().add_(in[1]),
                 at::pow(in[0], 3.0),
                 at::pow(2.0, in[0]),
                 in[0].abs(),
                 in[0].remainder(2)};
       }},
      {"activations",
       {{2, 5, 16}},
       [](const Tensors& in) -> Tensors {
         return {at::silu(in[0]),
                 at::gelu(in[0]),
                 at::gelu(in[0], "tanh"),
                 at::relu(in[0]),
                 at::mish(in[0]),
                 at::sigmoid(in[0]),
                 at::tanh(in[0]),
                 at::exp(in[0]),
                 at::cos(in[0]),
                 at::sin(in[0]),
                 at::rsqrt(in[0].abs() + 1),
                 at::log(in[0].abs() + 1),
                 at::reciprocal(in[0] + 3),
                 at::softmax(in[0], -1),
                 at::clamp(in[0], -0.5, 0.5),
                 in[0].clip(-1, 1)};
       }},
      {"reductions",
       {{2, 5, 16}},
       [](const Tensors& in) -> Tensors {
         return {in[0].pow(2).mean(-1, true),
                 in[0].sum(1),
                 in[0].amax({1, 2}),
                 in[0].argmax(-1),
                 in[0].isinf().any(),
                 at::isfinite(in[0]).all(),
                 in[0].cumsum(1)};
       }},
      {"comparisons",
       {{2, 5, 16}, {2, 5, 16}},
       [](const Tensors& in) -> Tensors {
         at::Tensor mask = in[0] > in[1];
         return {mask,
                 mask.logical_not(),
                 mask & (in[0] < 1),
                 at::isnan(in[0]),
                 at::where(mask, in[0], in[1]),
                 at::where(mask, in[0], -3.5),
                 at::minimum(in[0], in[1]),
                 in[0].clone().masked_fill_(mask, -1e4),
                 (in[0] == in[1]).to(at::kInt)};
       }},
      {"shapes",
       {{2, 6, 16}},
       [](const Tensors& in) -> Tensors {
         auto parts = in[0].chunk(3, -1);
         return {at::cat({in[0], in[0]}, 1),
                 at::stack({in[0], in[0]}, -1).flatten(2),
                 in[0].unflatten(-1, {4, 4}).permute({0, 2, 1, 3}).contiguous(),
                 parts[2],
                 in[0].narrow(1, 1, 3).select(0, 1),
                 in[0].reshape({-1, 4}),
                 in[0].expand({3, 2, 6, 16}),
                 at::constant_pad_nd(in[0], {0, 1, 2, 0}),
                 in[0].repeat({1, 2, 1}),
                 in[0].repeat_interleave(2, 1),
                 in[0].flip({1}),
                 in[0].tril(),
                 in[0].split(4, 1)[1],
                 in[0].unfold(1, 2, 2),
                 in[0].unbind(1)[3],
                 in[0].transpose(1, 2).clone()};
       }},
      {"up and down",
       {{2, 3, 4, 5}},
       [](const Tensors& in) -> Tensors {
         return {at::upsample_nearest2d(in[0], {8, 10}, 2.0, 2.0),
                 at::upsample_nearest2d(in[0].contiguous(at::MemoryFormat::ChannelsLast), {8, 10}),
                 at::avg_pool2d(in[0], {2, 2})};
       }},
      {"embedding and indices",
       {{10, 8}},
       [](const Tensors& in) -> Tensors {
         at::Tensor index = ids(in[0], {2, 3}, 10)[0];
         at::Tensor rows = at::arange(3, index.options());
         return {at::embedding(in[0], index), at::index_select(in[0], 1, index[0]),
                 in[0].index({rows, rows + 1}), in[0].gather(0, index),
                 in[0].clone().index_put_({rows, rows}, in[0][0][0])};
       }},
      {"factories",
       {{2, 3}},
       [](const Tensors& in) -> Tensors {
         auto options = in[0].options();
         return {at::arange(0, 9, 2, options),   at::zeros({2, 2}, options),
                 at::full({3}, 2.5, options),    at::ones({4, 4}, options.dtype(at::kBool)).tril(),
                 at::zeros_like(in[0]),          at::full_like(in[0], 7),
                 at::linspace(0, 1, 5, options), at::eye(3, options)};
       }},
      {"dtypes",
       {{2, 9}},
       [](const Tensors& in) -> Tensors {
         return {in[0].to(at::kDouble),
                 in[0].to(at::kFloat),
                 in[0].to(at::kBFloat16),
                 (in[0] * 10).to(at::kLong),
                 in[0].to(at::kHalf).to(at::kFloat),
                 in[0].contiguous().view(at::kByte),
                 at::outer(in[0][0].to(at::kDouble), in[0][1])};
       }},
  };
  return all;
}

Tensors inputs(const Case& one, at::ScalarType dtype) {
  auto generator = at::detail::createCPUGenerator(1);
  Tensors tensors;
  for (const auto& shape : one.shapes)
    tensors.push_back(at::randn(shape, generator, at::TensorOptions().dtype(at::kFloat)).to(dtype));
  return tensors;
}

Tensors moved(const Tensors& tensors, at::Device device) {
  Tensors result;
  for (const at::Tensor& tensor : tensors) result.push_back(tensor.to(device));
  return result;
}

// NaNs equal NaNs, and zeros have signs.
bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (!a.sizes().equals(b.sizes()) || a.scalar_type() != b.scalar_type()) return false;
  return at::equal(a.contiguous().view(-1).view(at::kByte),
                   b.contiguous().view(-1).view(at::kByte));
}

class FakeKernelsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    device = FakeAccelerator::install();
    FakeAccelerator::drain();
    FakeAccelerator::reset_counters();
  }
  static inline at::Device device{at::kCPU};
};

TEST_F(FakeKernelsTest, EqualTheCpuBitForBit) {
  for (auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const Case& one : cases()) {
      Tensors cpu = inputs(one, dtype), on_device = moved(cpu, device);
      at::NoGradGuard no_grad;
      Tensors expected = one.run(cpu);
      FakeAccelerator::drain();
      FakeAccelerator::reset_counters();
      Tensors got = one.run(on_device);
      FakeCounters counters = FakeAccelerator::counters();
      ASSERT_EQ(got.size(), expected.size());
      for (size_t i = 0; i < got.size(); ++i) {
        EXPECT_TRUE(got[i].is_privateuseone());
        EXPECT_TRUE(same_bits(got[i].to(at::kCPU), expected[i]))
            << one.name << " " << dtype << " result " << i;
      }
      for (const std::string& why : counters.host_synchronizations)
        ADD_FAILURE() << one.name << " " << dtype << ": the host waited for " << why;
    }
  }
}

TEST_F(FakeKernelsTest, RunInInferenceMode) {
  for (const Case& one : cases()) {
    c10::InferenceMode inference;
    Tensors cpu = inputs(one, at::kFloat), on_device = moved(cpu, device);
    Tensors expected = one.run(cpu), got = one.run(on_device);
    for (size_t i = 0; i < got.size(); ++i)
      EXPECT_TRUE(same_bits(got[i].to(at::kCPU), expected[i])) << one.name << " result " << i;
  }
}

TEST_F(FakeKernelsTest, DependOnDataMakesTheHostWait) {
  at::Tensor cpu = at::randn({5, 6}), x = cpu.to(device);
  EXPECT_TRUE(at::equal(at::nonzero(x > 0).to(at::kCPU), at::nonzero(cpu > 0)));
  EXPECT_TRUE(at::equal(at::masked_select(x, x > 0).to(at::kCPU), at::masked_select(cpu, cpu > 0)));
  EXPECT_TRUE(at::equal(x.index({x > 0}).to(at::kCPU), cpu.index({cpu > 0})));
  EXPECT_TRUE(at::equal(std::get<0>(x.sort(1)).to(at::kCPU), std::get<0>(cpu.sort(1))));
  EXPECT_TRUE(at::equal(x, x.clone()));
  EXPECT_FALSE(at::equal(x, x + 1));
  auto waits = FakeAccelerator::counters().host_synchronizations;
  EXPECT_NE(std::find(waits.begin(), waits.end(), "aten::nonzero"), waits.end());
  EXPECT_NE(std::find(waits.begin(), waits.end(), "aten::equal"), waits.end());
}

TEST_F(FakeKernelsTest, RejectCpuTensors) {
  at::Tensor x = at::ones({2, 2}, device), host = at::ones({2, 2});
  EXPECT_THROW(x + host, c10::Error);
  EXPECT_THROW(host.mul(x), c10::Error);
  EXPECT_THROW(at::linear(x, host), c10::Error);
  EXPECT_THROW(at::cat({x, host}), c10::Error);
  EXPECT_THROW(x.add_(host), c10::Error);
  // A 0-dim tensor counts as a number; the dtype of a wrapped number does not widen.
  EXPECT_TRUE(at::equal((x * at::scalar_tensor(3)).to(at::kCPU), host * 3));
  at::Tensor half = x.to(at::kBFloat16);
  EXPECT_EQ((half * 2.5).scalar_type(), at::kBFloat16);
}

TEST_F(FakeKernelsTest, InferShapesThatTheCpuWouldGive) {
  // An error in a shape is found when it is enqueued, as on a GPU.
  at::Tensor x = at::ones({2, 3}, device);
  EXPECT_THROW(at::mm(x, x), c10::Error);
  EXPECT_THROW(x + at::ones({4}, device), c10::Error);
}

TEST_F(FakeKernelsTest, ResizeKeepsTheBytes) {
  at::Tensor x = at::arange(4, at::TensorOptions(device).dtype(at::kFloat));
  x.resize_({8});
  EXPECT_TRUE(at::equal(x.narrow(0, 0, 4).to(at::kCPU), at::arange(4).to(at::kFloat)));
  EXPECT_TRUE(at::isnan(x.narrow(0, 4, 4).to(at::kCPU)).all().item<bool>());
  at::Tensor out = at::empty({0}, device);
  at::add_out(out, x, x);
  EXPECT_EQ(out.sizes(), at::IntArrayRef({8}));
}

// ---- set_data: how offloading moves a parameter ----

TEST_F(FakeKernelsTest, SetDataGoesToTheDeviceAndBack) {
  at::Tensor cpu = at::randn({3, 4});
  at::Tensor parameter = cpu.clone();
  const c10::TensorImpl* identity = parameter.unsafeGetTensorImpl();
  parameter.set_data(cpu.to(device));
  EXPECT_TRUE(parameter.is_privateuseone());
  EXPECT_TRUE(at::equal((parameter + 0).to(at::kCPU), cpu));
  parameter.set_data(cpu.to(device, at::kBFloat16));
  EXPECT_EQ(parameter.scalar_type(), at::kBFloat16);
  parameter.set_data(cpu);
  EXPECT_TRUE(parameter.is_cpu());
  EXPECT_EQ(parameter.unsafeGetTensorImpl(), identity);
  {
    c10::InferenceMode inference;
    at::Tensor fresh = [&] {
      c10::InferenceMode off(false);
      return cpu.to(device);
    }();
    parameter.set_data(fresh);
  }
  EXPECT_TRUE(parameter.is_privateuseone());
}

TEST_F(FakeKernelsTest, TypedViewsOfAFlatBufferShareItsStorage) {
  at::Tensor bytes = at::empty({4096}, at::TensorOptions(device).dtype(at::kByte));
  at::Tensor floats = bytes.narrow(0, 512, 64).view(at::kFloat).view({4, 4});
  at::Tensor halves = bytes.narrow(0, 1024, 32).view(at::kBFloat16).view({4, 4});
  at::Tensor host = at::randn({4, 4});
  floats.copy_(host);
  halves.copy_(host);
  EXPECT_TRUE(floats.is_alias_of(bytes));
  EXPECT_TRUE(at::equal(at::mm(floats, floats).to(at::kCPU), at::mm(host, host)));
  EXPECT_TRUE(at::equal(halves.to(at::kCPU), host.to(at::kBFloat16)));
}

// ---- gradients ----

TEST_F(FakeKernelsTest, GradientsEqualTheCpus) {
  auto loss = [](const Tensors& in) {
    at::Tensor x = at::linear(in[0], in[1], in[2]);
    x = at::rms_norm(at::layer_norm(x, {8}), {8}, {}, 1e-6);
    x = at::silu(x).unsqueeze(1);
    return at::scaled_dot_product_attention(x, x, x).pow(2).sum();
  };
  Tensors cpu = {at::randn({2, 5, 4}), at::randn({8, 4}), at::randn({8})}, on_device;
  for (at::Tensor& tensor : cpu) on_device.push_back(tensor.to(device).requires_grad_());
  for (at::Tensor& tensor : cpu) tensor.requires_grad_();
  loss(cpu).backward();
  loss(on_device).backward();
  for (size_t i = 0; i < cpu.size(); ++i) {
    ASSERT_TRUE(on_device[i].grad().defined()) << i;
    EXPECT_TRUE(at::allclose(on_device[i].grad().to(at::kCPU), cpu[i].grad(), 1e-4, 1e-5)) << i;
  }
}

}  // namespace
}  // namespace ferry::testing
