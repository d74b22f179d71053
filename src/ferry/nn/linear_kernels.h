// Which kernel computes a linear layer or a convolution whose weights are bfloat16 or float16. On a
// CPU without fast instructions for them the library's own kernels fall back to loops that are many
// times slower than float32; there the weights are widened block by block into cache-sized buffers.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <optional>
#include <string>
#include <string_view>

namespace ferry::nn {

// What the CPU, and what the user allows oneDNN to use of it.
struct CpuFeatures {
  bool x86 = false;
  bool avx512_bf16 = false;
  bool avx512_fp16 = false;
  bool avx_ne_convert = false;
  // Dot products of int8: AVX512-VNNI, AVX-VNNI, AMX-INT8.
  bool avx512_vnni = false;
  bool avx_vnni = false;
  bool amx_int8 = false;
  bool arm_bf16 = false;
  bool arm_fp16 = false;
  // oneDNN, through which x86 reaches those instructions, is enabled.
  bool onednn = true;
  // ONEDNN_MAX_CPU_ISA in upper case; empty for no limit.
  std::string max_isa;
};
// Of this machine; found once.
const CpuFeatures& cpu_features();

enum class LinearKernel {
  native,         // the library's kernel on the tensors as they are
  upcast_blocks,  // float32 sgemm on widened blocks, rounded once at the end
};

struct LinearKernelChoice {
  LinearKernel kernel;
  std::string_view reason;
};

// FERRY_LINEAR_KERNEL=native|upcast, where it is set. Throws ArgumentError for anything else.
std::optional<LinearKernel> forced_linear_kernel();

// Pure. forced_linear_kernel() overrides it on CPUs in the function below, which reads it once.
LinearKernelChoice choose_linear_kernel(at::Device device, at::ScalarType dtype,
                                        const CpuFeatures& features);
// For this machine; logs each outcome once.
LinearKernelChoice choose_linear_kernel(at::Device device, at::ScalarType dtype);

// x [..., in], weight [out, in], bias [out] or undefined -> [..., out], in the dtype of `x`.
// Weights kept in a float8 dtype (hooks/layerwise_casting.h) are widened to that of `x`.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias = {});

struct Conv2dGeometry {
  int64_t stride = 1;
  int64_t padding = 0;
  int64_t dilation = 1;
  int64_t groups = 1;
};
// As linear(). x [batch, in, height, width], weight [out, in / groups, kernel, kernel] -> [batch,
// out, h, w].
at::Tensor conv2d(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                  const Conv2dGeometry& geometry);

// The two kernels by name, for tests and benches. They need matching dtypes and no autograd.
at::Tensor linear_upcast_blocks(const at::Tensor& x, const at::Tensor& weight,
                                const at::Tensor& bias);
at::Tensor conv2d_upcast_blocks(const at::Tensor& x, const at::Tensor& weight,
                                const at::Tensor& bias, const Conv2dGeometry& geometry);

// Whether an operation on these, some perhaps undefined, is recorded for autograd.
template <class... Tensors>
bool records_gradient(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && ((tensors.defined() && tensors.requires_grad()) || ...);
}

// An optional argument of torch from a tensor that may be undefined.
inline std::optional<at::Tensor> optional_tensor(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

}  // namespace ferry::nn
