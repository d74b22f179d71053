#include "ferry/nn/linear.h"

#include "ferry/nn/linear_kernels.h"

namespace ferry::nn {

Linear::Linear(int64_t in_features, int64_t out_features, bool with_bias)
    : in_features_(in_features), out_features_(out_features) {
  weight = stub_parameter("weight", {out_features, in_features});
  if (with_bias) bias = stub_parameter("bias", {out_features});
}

at::Tensor Linear::forward(const at::Tensor& x) {
  return nn::linear(x, weight, bias);
}

}  // namespace ferry::nn
