#include "ferry/nn/norms.h"

#include <ATen/ATen.h>

#include "ferry/base/error.h"
#include "ferry/nn/linear_kernels.h"

namespace ferry::nn {

LayerNorm::LayerNorm(int64_t dim, double eps, bool elementwise_affine, bool with_bias)
    : dim_(dim), eps_(eps) {
  if (!elementwise_affine) return;
  weight = stub_parameter("weight", {dim});
  if (with_bias) bias = stub_parameter("bias", {dim});
}

at::Tensor LayerNorm::forward(const at::Tensor& x) {
  return at::layer_norm(x, {dim_}, optional_tensor(weight), optional_tensor(bias), eps_);
}

RMSNorm::RMSNorm(int64_t dim, std::optional<double> eps, bool elementwise_affine)
    : dim_(dim), eps_(eps) {
  if (elementwise_affine) weight = stub_parameter("weight", {dim});
}

at::Tensor RMSNorm::forward(const at::Tensor& x) {
  return at::rms_norm(x, {dim_}, optional_tensor(weight), eps_);
}

DiffusersRMSNorm::DiffusersRMSNorm(int64_t dim, double eps, bool elementwise_affine, bool with_bias)
    : eps_(eps) {
  if (!elementwise_affine) return;
  weight = stub_parameter("weight", {dim});
  if (with_bias) bias = stub_parameter("bias", {dim});
}

at::Tensor DiffusersRMSNorm::forward(const at::Tensor& hidden_states) {
  at::Tensor variance = hidden_states.to(at::kFloat).pow(2).mean(-1, /*keepdim=*/true);
  at::Tensor x = hidden_states * at::rsqrt(variance + eps_);
  if (!weight.defined()) return x.to(hidden_states.scalar_type());
  if (weight.scalar_type() == at::kHalf || weight.scalar_type() == at::kBFloat16) {
    x = x.to(weight.scalar_type());
  }
  x = x * weight;
  return bias.defined() ? x + bias : x;
}

GroupNorm::GroupNorm(int64_t num_groups, int64_t num_channels, double eps, bool affine)
    : num_groups_(num_groups), eps_(eps) {
  if (num_groups <= 0 || num_channels % num_groups != 0) {
    throw_error<ArgumentError>("GroupNorm: {} channels do not divide into {} groups", num_channels,
                               num_groups);
  }
  if (!affine) return;
  weight = stub_parameter("weight", {num_channels});
  bias = stub_parameter("bias", {num_channels});
}

at::Tensor GroupNorm::forward(const at::Tensor& x) {
  return at::group_norm(x, num_groups_, optional_tensor(weight), optional_tensor(bias), eps_);
}

}  // namespace ferry::nn
