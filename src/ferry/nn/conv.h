// torch.nn.Conv2d with hooks and without memory at construction.
#pragma once

#include "ferry/nn/linear_kernels.h"
#include "ferry/nn/module.h"

namespace ferry::nn {

struct Conv2dOptions {
  int64_t kernel_size = 3;
  int64_t stride = 1;
  int64_t padding = 0;
  int64_t dilation = 1;
  int64_t groups = 1;
  bool bias = true;
};

class Conv2d : public Module {
 public:
  Conv2d(int64_t in_channels, int64_t out_channels, const Conv2dOptions& options);

  // [batch, in_channels, height, width] -> [batch, out_channels, height', width'].
  at::Tensor forward(const at::Tensor& x);

  int64_t out_channels() const { return weight.size(0); }

  at::Tensor weight;  // [out_channels, in_channels / groups, kernel_size, kernel_size]
  at::Tensor bias;    // [out_channels], or undefined

 private:
  Conv2dGeometry geometry_;
};

}  // namespace ferry::nn
