// The product with a quantized weight: which kernel, and why.
#pragma once

#include <ATen/core/Tensor.h>

#include "ferry/quant/quantized_weight.h"

namespace ferry::nn {

// x [..., in], bias [out] or undefined -> [..., out], in the dtype of `x`.
at::Tensor quantized_linear(const at::Tensor& x, const quant::QuantizedWeight& weight,
                            quant::ComponentTensors components, const at::Tensor& bias = {});

}  // namespace ferry::nn
