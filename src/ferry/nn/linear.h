// torch.nn.Linear with hooks and without memory at construction.
#pragma once

#include "ferry/nn/module.h"

namespace ferry::nn {

class Linear : public Module {
 public:
  Linear(int64_t in_features, int64_t out_features, bool with_bias = true);

  // [..., in_features] -> [..., out_features]; the kernel is chosen in linear_kernels.h.
  at::Tensor forward(const at::Tensor& x);

  int64_t in_features() const { return in_features_; }
  int64_t out_features() const { return out_features_; }

  at::Tensor weight;  // [out_features, in_features]
  at::Tensor bias;    // [out_features], or undefined

 private:
  int64_t in_features_;
  int64_t out_features_;
};

}  // namespace ferry::nn
