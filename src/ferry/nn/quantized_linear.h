// The product with a quantized weight: which kernel, and why.
//
// On the CPU a weight is dequantized a block of output rows at a time (scratch_bytes()) into the
// operand of the library's GEMM, which writes its columns of the output; where the CPU has no fast
// bfloat16 or float16 (linear_kernels.h) the blocks are float32. Everywhere the result depends on
// the inputs and the number of threads alone, not on where the components lie.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "ferry/nn/linear_kernels.h"
#include "ferry/quant/quantized_weight.h"

namespace ferry::nn {

// What is done with `x` first, if anything, is the scheme's (quant::Activation), not the kernel's.
enum class QuantizedKernel {
  dequantize,         // the whole weight by torch's operators, then linear()
  dequantize_blocks,  // blocks of rows in the dtype of `x`, a GEMM each
  upcast_blocks,      // blocks of rows in float32, an sgemm each, rounded once
                      // (both: up to four rows of `x`, small blocks in float32, a thread each)
  int8_blocks,    // int8 GEMMs with int32 blocks of products, scaled while they are in the cache
  int8_as_float,  // the same numbers by sgemm on whole numbers in float32
  int8_mm,        // the accelerator's int8 GEMM: at::_int_mm
  float8_mm,      // the accelerator's float8 GEMM: at::_scaled_mm
};
std::string_view name(QuantizedKernel kernel);

struct QuantizedKernelChoice {
  QuantizedKernel kernel;
  std::string_view reason;
};

// What the choice depends on.
struct QuantizedCase {
  at::Device device = at::Device(at::kCPU);
  quant::Activation activation = quant::Activation::as_is;
  // The weight is a matrix of int8 or float8 e4m3 and scales (QuantizedWeight::as_scaled_matrix);
  // undefined where it is not.
  at::ScalarType matrix = at::ScalarType::Undefined;
  bool scale_per_row = true;
  int64_t x_rows = 1, in_features = 1, out_features = 1;
  at::ScalarType dtype = at::kFloat;  // of x
  bool records_gradient = false;
  // The accelerator multiplies matrices of that type: a small product of them did not fail.
  bool multiplies_matrix = false;
};

// Pure. FERRY_QUANTIZED_KERNEL=dequantize|dequantize_blocks|upcast_blocks|int8_blocks|int8_as_float
// (read once, by the function below) overrides it on CPUs, where the named kernel can compute the
// case and no gradient is recorded; FERRY_LINEAR_KERNEL decides between native and widened blocks.
QuantizedKernelChoice choose_quantized_kernel(const QuantizedCase& what,
                                              const CpuFeatures& features);
// For this machine; logs each outcome once.
QuantizedKernelChoice choose_quantized_kernel(const QuantizedCase& what);

// x [..., in], bias [out] or undefined -> [..., out], in the dtype of `x`. An input that the scheme
// quantizes dynamically is quantized as TorchAO does it. int8: the result is TorchAO's bit for bit
// with int8_blocks; within the rounding of float32 sums, which bfloat16 hides but for single
// values, with int8_as_float. float8: the input goes to float8 and back, so that the result is
// TorchAO's but for two roundings to the dtype of `x` a product.
at::Tensor quantized_linear(const at::Tensor& x, const quant::QuantizedWeight& weight,
                            quant::ComponentTensors components, const at::Tensor& bias = {});

// The CPU kernels by name, for tests and benches. They record no gradient.
at::Tensor quantized_linear_with(QuantizedKernel kernel, const at::Tensor& x,
                                 const quant::QuantizedWeight& weight,
                                 quant::ComponentTensors components, const at::Tensor& bias = {});

// The most that a kernel's blocks take beside input and output, quantized copies of the input and
// what the library's GEMM takes for itself: 16 MiB, from nine threads on 2 MiB a thread, and never
// less than 16 rows of weights.
int64_t scratch_bytes(int threads);

}  // namespace ferry::nn
