// What quantizing a weight lost.
#pragma once

#include <ATen/core/Tensor.h>

#include "ferry/quant/quantized_weight.h"

namespace ferry::quant {

// Signal-to-quantization-noise ratio in decibels, 10 log10(sum w^2 / sum (w - dequantized)^2);
// infinite where nothing was lost. weight: [out, in], floating-point, on the CPU as the components.
double sqnr_db(const at::Tensor& weight, const QuantizedWeight& description,
               ComponentTensors components);

}  // namespace ferry::quant
