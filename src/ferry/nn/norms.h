// The plain normalizations.
#pragma once

#include "ferry/nn/module.h"

namespace ferry::nn {

// torch.nn.LayerNorm over the last dimension.
class LayerNorm : public Module {
 public:
  explicit LayerNorm(int64_t dim, double eps = 1e-5, bool elementwise_affine = true,
                     bool with_bias = true);
  // [..., dim] -> [..., dim]
  at::Tensor forward(const at::Tensor& x);

  at::Tensor weight;  // [dim], or undefined
  at::Tensor bias;

 private:
  int64_t dim_;
  double eps_;
};

// torch.nn.RMSNorm over the last dimension.
class RMSNorm : public Module {
 public:
  explicit RMSNorm(int64_t dim, std::optional<double> eps = std::nullopt,
                   bool elementwise_affine = true);
  // [..., dim] -> [..., dim]
  at::Tensor forward(const at::Tensor& x);

  at::Tensor weight;  // [dim], or undefined

 private:
  int64_t dim_;
  std::optional<double> eps_;
};

// diffusers' own RMSNorm (models/normalization.py): the variance and the product with its root are
// float32, rounded to the weight's dtype before the product with the weight if that is half
// precision. Without a weight the result has the input's dtype.
class DiffusersRMSNorm : public Module {
 public:
  DiffusersRMSNorm(int64_t dim, double eps, bool elementwise_affine = true, bool with_bias = false);
  // [..., dim] -> [..., dim]
  at::Tensor forward(const at::Tensor& hidden_states);

  at::Tensor weight;  // [dim], or undefined
  at::Tensor bias;

 private:
  double eps_;
};

// torch.nn.GroupNorm.
class GroupNorm : public Module {
 public:
  GroupNorm(int64_t num_groups, int64_t num_channels, double eps = 1e-5, bool affine = true);
  // [batch, channels, ...] -> the same shape
  at::Tensor forward(const at::Tensor& x);

  at::Tensor weight;  // [channels], or undefined
  at::Tensor bias;

 private:
  int64_t num_groups_;
  double eps_;
};

}  // namespace ferry::nn
