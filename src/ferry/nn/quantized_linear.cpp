#include "ferry/nn/quantized_linear.h"

#include "ferry/nn/linear_kernels.h"

namespace ferry::nn {

at::Tensor quantized_linear(const at::Tensor& x, const quant::QuantizedWeight& weight,
                            quant::ComponentTensors components, const at::Tensor& bias) {
  return linear(x, weight.dequantize(components, x.scalar_type()), bias);
}

}  // namespace ferry::nn
