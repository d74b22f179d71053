#include "ferry/nn/conv.h"

namespace ferry::nn {

Conv2d::Conv2d(int64_t in_channels, int64_t out_channels, const Conv2dOptions& options)
    : geometry_{options.stride, options.padding, options.dilation, options.groups} {
  weight = stub_parameter("weight", {out_channels, in_channels / options.groups,
                                     options.kernel_size, options.kernel_size});
  if (options.bias) bias = stub_parameter("bias", {out_channels});
}

at::Tensor Conv2d::forward(const at::Tensor& x) {
  return nn::conv2d(x, weight, bias, geometry_);
}

}  // namespace ferry::nn
