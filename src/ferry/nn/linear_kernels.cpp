#include "ferry/nn/linear_kernels.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cctype>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "ferry/base/error.h"
#include "ferry/base/log.h"

namespace ferry::nn {

namespace {

std::string upper_environment(const char* name) {
  const char* value = std::getenv(name);
  std::string text = value ? value : "";
  for (char& c : text) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return text;
}

CpuFeatures detect_cpu_features() {
  CpuFeatures features;
  features.onednn = at::globalContext().hasMKLDNN() && at::globalContext().userEnabledMkldnn();
  features.max_isa = upper_environment("ONEDNN_MAX_CPU_ISA");
  if (features.max_isa.empty()) features.max_isa = upper_environment("DNNL_MAX_CPU_ISA");
#if defined(__x86_64__)
  features.x86 = true;
  unsigned a = 0, b = 0, c = 0, d = 0;
  // __builtin_cpu_supports also asks whether the system saves the wide registers.
  bool avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512dq");
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    features.avx512_fp16 = avx512 && (d >> 23 & 1);
    features.avx512_vnni = avx512 && (c >> 11 & 1);
    features.amx_int8 = avx512 && (d >> 25 & 1);
  }
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    features.avx512_bf16 = avx512 && (a >> 5 & 1);
    features.avx_vnni = __builtin_cpu_supports("avx2") && (a >> 4 & 1);
    features.avx_ne_convert = __builtin_cpu_supports("avx2") && (d >> 5 & 1);
  }
#else
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("Features", 0) != 0) continue;
    std::istringstream words(line);
    for (std::string word; words >> word;) {
      if (word == "bf16") features.arm_bf16 = true;
      if (word == "asimdhp") features.arm_fp16 = true;
    }
    break;
  }
#endif
  return features;
}

bool contains(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

// Whether the limit of ONEDNN_MAX_CPU_ISA still lets oneDNN use the instructions.
bool isa_allows(const std::string& max_isa, at::ScalarType dtype, bool avx512) {
  if (max_isa.empty() || max_isa == "ALL" || max_isa == "DEFAULT" || contains(max_isa, "AVX10")) {
    return true;
  }
  if (!avx512) return max_isa == "AVX2_VNNI_2" || contains(max_isa, "AVX512");
  bool amx = contains(max_isa, "AMX");
  if (dtype == at::kBFloat16) return amx || contains(max_isa, "BF16") || contains(max_isa, "FP16");
  return amx || contains(max_isa, "FP16");
}

// Widened blocks of weights stay in the second-level cache's reach; widened rows of the input are
// larger, since each of their blocks reads all weights again.
constexpr int64_t kWeightBlockBytes = 4 << 20;
constexpr int64_t kInputBlockBytes = 32 << 20;

int64_t rows_in(int64_t bytes, int64_t row_elements) {
  return std::max<int64_t>(1, bytes / std::max<int64_t>(1, row_elements * int64_t{sizeof(float)}));
}

bool low_precision(at::ScalarType dtype) {
  return dtype == at::kBFloat16 || dtype == at::kHalf;
}

bool use_upcast(const at::Tensor& x, const at::Tensor& weight) {
  if (!x.is_cpu() || !low_precision(weight.scalar_type())) return false;
  return x.scalar_type() == weight.scalar_type() &&
         choose_linear_kernel(x.device(), weight.scalar_type()).kernel ==
             LinearKernel::upcast_blocks;
}

std::optional<at::Tensor> widened(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor.to(at::kFloat)) : std::nullopt;
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect_cpu_features();
  return features;
}

std::optional<LinearKernel> forced_linear_kernel() {
  const std::string name = upper_environment("FERRY_LINEAR_KERNEL");
  if (name.empty()) return std::nullopt;
  if (name == "NATIVE") return LinearKernel::native;
  if (name == "UPCAST") return LinearKernel::upcast_blocks;
  throw_error<ArgumentError>("FERRY_LINEAR_KERNEL: got '{}', expected native or upcast", name);
}

LinearKernelChoice choose_linear_kernel(at::Device device, at::ScalarType dtype,
                                        const CpuFeatures& features) {
  using enum LinearKernel;
  if (!device.is_cpu()) return {native, "not on a CPU"};
  if (!low_precision(dtype)) return {native, "neither bfloat16 nor float16"};
  bool bf16 = dtype == at::kBFloat16;
  if (!features.x86) {
    return (bf16 ? features.arm_bf16 : features.arm_fp16)
               ? LinearKernelChoice{native, "the CPU has instructions for the dtype"}
               : LinearKernelChoice{upcast_blocks, "the CPU has no instructions for the dtype"};
  }
  if (!features.onednn) return {upcast_blocks, "oneDNN is disabled"};
  bool avx512 = bf16 ? features.avx512_bf16 : features.avx512_fp16;
  if (!avx512 && !features.avx_ne_convert) {
    return {upcast_blocks, bf16 ? "the CPU has neither AVX512-BF16 nor AVX-NE-CONVERT"
                                : "the CPU has neither AVX512-FP16 nor AVX-NE-CONVERT"};
  }
  if (!isa_allows(features.max_isa, dtype, avx512) &&
      !(features.avx_ne_convert && isa_allows(features.max_isa, dtype, false))) {
    return {upcast_blocks, "ONEDNN_MAX_CPU_ISA forbids the instructions for the dtype"};
  }
  return {native, "the CPU has instructions for the dtype"};
}

LinearKernelChoice choose_linear_kernel(at::Device device, at::ScalarType dtype) {
  if (!device.is_cpu() || !low_precision(dtype)) {
    return {LinearKernel::native, "not a half-precision dtype on a CPU"};
  }
  static const auto choices = [] {
    const std::optional<LinearKernel> forced = forced_linear_kernel();
    std::array<LinearKernelChoice, 2> both{};
    for (at::ScalarType type : {at::kBFloat16, at::kHalf}) {
      auto choice = choose_linear_kernel(at::Device(at::kCPU), type, cpu_features());
      if (forced) choice = {*forced, "FERRY_LINEAR_KERNEL"};
      log::debug("{} linear layers on the CPU: {} kernel ({})",
                 type == at::kHalf ? "float16" : "bfloat16",
                 choice.kernel == LinearKernel::native ? "native" : "upcast_blocks", choice.reason);
      both[type == at::kHalf] = choice;
    }
    return both;
  }();
  return choices[dtype == at::kHalf];
}

at::Tensor linear_upcast_blocks(const at::Tensor& x, const at::Tensor& weight,
                                const at::Tensor& bias) {
  int64_t in = weight.size(1), out = weight.size(0);
  at::Tensor rows = x.reshape({-1, in});
  at::Tensor result = at::empty({rows.size(0), out}, x.options());
  std::optional<at::Tensor> wide_bias = widened(bias);
  int64_t row_step = rows_in(kInputBlockBytes, in), out_step = rows_in(kWeightBlockBytes, in);
  at::TensorOptions wide = x.options().dtype(at::kFloat);
  at::Tensor weight_block = at::empty({std::min(out_step, out), in}, wide);
  for (int64_t row = 0; row < rows.size(0); row += row_step) {
    int64_t row_count = std::min(row_step, rows.size(0) - row);
    at::Tensor wide_rows = rows.narrow(0, row, row_count).to(at::kFloat);
    for (int64_t column = 0; column < out; column += out_step) {
      int64_t count = std::min(out_step, out - column);
      at::Tensor block = weight_block.narrow(0, 0, count).copy_(weight.narrow(0, column, count));
      at::Tensor product =
          wide_bias ? at::addmm(wide_bias->narrow(0, column, count), wide_rows, block.t())
                    : at::mm(wide_rows, block.t());
      result.narrow(0, row, row_count).narrow(1, column, count).copy_(product);
    }
  }
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = out;
  return result.view(shape);
}

namespace {

// A weight that is stored narrower than anything computes.
bool is_narrow(const at::Tensor& weight, const at::Tensor& x) {
  return at::isFloat8Type(weight.scalar_type()) && !at::isFloat8Type(x.scalar_type());
}

bool is_one_row_of_float32(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat && x.dim() > 0 && x.numel() > 0 && x.numel() == x.size(-1);
}

// The library's product of a vector sums in an order that depends on the weight's address modulo
// 16, and a streamed weight lies where its file has it. That of two rows does not. So on every
// device, that all of them compute the same.
at::Tensor linear_of_one_row(const at::Tensor& x, const at::Tensor& weight,
                             const at::Tensor& bias) {
  at::Tensor twice = x.reshape({1, x.size(-1)}).expand({2, x.size(-1)});
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  return at::linear(twice, weight, optional_tensor(bias)).narrow(0, 0, 1).reshape(shape);
}

at::Tensor widened_to(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.defined() ? tensor.to(dtype) : tensor;
}

}  // namespace

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  if (is_narrow(weight, x))
    return linear(x, weight.to(x.scalar_type()), widened_to(bias, x.scalar_type()));
  if (is_one_row_of_float32(x)) return linear_of_one_row(x, weight, bias);
  if (!use_upcast(x, weight)) return at::linear(x, weight, optional_tensor(bias));
  if (records_gradient(x, weight, bias)) {
    return at::linear(x.to(at::kFloat), weight.to(at::kFloat), widened(bias)).to(x.scalar_type());
  }
  return linear_upcast_blocks(x, weight, bias);
}

at::Tensor conv2d_upcast_blocks(const at::Tensor& x, const at::Tensor& weight,
                                const at::Tensor& bias, const Conv2dGeometry& g) {
  int64_t height = x.size(2), width = x.size(3), out = weight.size(0);
  int64_t reach_h = g.dilation * (weight.size(2) - 1) + 1;
  int64_t reach_w = g.dilation * (weight.size(3) - 1) + 1;
  int64_t out_height = (height + 2 * g.padding - reach_h) / g.stride + 1;
  int64_t out_width = (width + 2 * g.padding - reach_w) / g.stride + 1;
  at::Tensor result =
      at::empty({x.size(0), out, out_height, out_width}, x.options(), x.suggest_memory_format());
  at::Tensor wide_weight = weight.to(at::kFloat);
  std::optional<at::Tensor> wide_bias = widened(bias);
  // Stripes of output rows; each reads its input rows and those that the kernel reaches beyond.
  int64_t row_elements = std::max(x.size(1) * width * g.stride, out * out_width);
  int64_t step = rows_in(kInputBlockBytes, row_elements);
  for (int64_t n = 0; n < x.size(0); ++n) {
    for (int64_t row = 0; row < out_height; row += step) {
      int64_t rows = std::min(step, out_height - row);
      int64_t begin = row * g.stride - g.padding;
      int64_t end = begin + (rows - 1) * g.stride + reach_h;
      int64_t first = std::max<int64_t>(0, begin), last = std::min(height, end);
      at::Tensor stripe = x.narrow(0, n, 1).narrow(2, first, last - first).to(at::kFloat);
      int64_t above = first - begin, below = end - last;
      if (above > 0 || below > 0) stripe = at::constant_pad_nd(stripe, {0, 0, above, below});
      at::Tensor part = at::convolution(stripe, wide_weight, wide_bias, {g.stride, g.stride},
                                        {0, g.padding}, {g.dilation, g.dilation},
                                        /*transposed=*/false, {0, 0}, g.groups);
      result.narrow(0, n, 1).narrow(2, row, rows).copy_(part);
    }
  }
  return result;
}

at::Tensor conv2d(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                  const Conv2dGeometry& g) {
  if (is_narrow(weight, x))
    return conv2d(x, weight.to(x.scalar_type()), widened_to(bias, x.scalar_type()), g);
  auto plain = [&](const at::Tensor& input, const at::Tensor& kernel,
                   const std::optional<at::Tensor>& offset) {
    return at::conv2d(input, kernel, offset, {g.stride, g.stride}, {g.padding, g.padding},
                      {g.dilation, g.dilation}, g.groups);
  };
  if (!use_upcast(x, weight) || x.dim() != 4) return plain(x, weight, optional_tensor(bias));
  if (records_gradient(x, weight, bias)) {
    return plain(x.to(at::kFloat), weight.to(at::kFloat), widened(bias)).to(x.scalar_type());
  }
  return conv2d_upcast_blocks(x, weight, bias, g);
}

}  // namespace ferry::nn
