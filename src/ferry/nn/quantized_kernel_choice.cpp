// Which kernel multiplies with a quantized weight: quantized_linear.h.
#include <array>
#include <cstdlib>
#include <initializer_list>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/nn/quantized_linear.h"

namespace ferry::nn {

namespace {

using quant::Activation;

constexpr std::array<std::pair<QuantizedKernel, std::string_view>, 7> kNames{{
    {QuantizedKernel::dequantize, "dequantize"},
    {QuantizedKernel::dequantize_blocks, "dequantize_blocks"},
    {QuantizedKernel::upcast_blocks, "upcast_blocks"},
    {QuantizedKernel::int8_blocks, "int8_blocks"},
    {QuantizedKernel::int8_as_float, "int8_as_float"},
    {QuantizedKernel::int8_mm, "int8_mm"},
    {QuantizedKernel::float8_mm, "float8_mm"},
}};

bool int8_instructions(const CpuFeatures& features) {
  auto allowed = [&](std::initializer_list<std::string_view> words) {
    const std::string& isa = features.max_isa;
    return isa.empty() || isa == "ALL" || isa == "DEFAULT" ||
           std::any_of(words.begin(), words.end(),
                       [&](std::string_view word) { return isa.find(word) != std::string::npos; });
  };
  if (!features.onednn) return false;
  return (features.avx512_vnni && allowed({"AVX512_CORE_VNNI", "BF16", "FP16", "AMX", "AVX10"})) ||
         (features.amx_int8 && allowed({"AMX", "AVX10"})) ||
         (features.avx_vnni && allowed({"VNNI", "BF16", "FP16", "AMX", "AVX10"}));
}

bool is_float8(Activation activation) {
  return activation == Activation::float8_per_token || activation == Activation::float8_per_tensor;
}

QuantizedKernelChoice choose_on_accelerator(const QuantizedCase& what) {
  using enum QuantizedKernel;
  if (what.activation == Activation::as_is) return {dequantize, "not on a CPU"};
  bool int8 = what.activation == Activation::int8_per_token && what.matrix == at::kChar;
  bool float8 = is_float8(what.activation) && what.matrix == at::kFloat8_e4m3fn;
  if (!int8 && !float8) return {dequantize, "the weight is no matrix of that type with scales"};
  if (!what.multiplies_matrix) return {dequantize, "the device multiplies no such matrices"};
  // cuBLAS's conditions.
  int64_t unit = int8 ? 8 : 16;
  if (what.in_features % unit != 0 || what.out_features % unit != 0) {
    return {dequantize, "the device's kernel wants sizes divisible by 8 (int8) or 16 (float8)"};
  }
  if (int8) {
    return what.x_rows > 16 ? QuantizedKernelChoice{int8_mm, "the device multiplies int8"}
                            : QuantizedKernelChoice{dequantize, "16 rows of input or fewer"};
  }
  if (what.scale_per_row != (what.activation == Activation::float8_per_token)) {
    return {dequantize, "scales of weight and input are of different kinds"};
  }
  if (what.dtype != at::kBFloat16) return {dequantize, "the device's kernel gives bfloat16"};
  return {float8_mm, "the device multiplies float8"};
}

// As the same product with a plain weight.
QuantizedKernel for_blocks(const LinearKernelChoice& plain) {
  return plain.kernel == LinearKernel::native ? QuantizedKernel::dequantize_blocks
                                              : QuantizedKernel::upcast_blocks;
}

std::optional<QuantizedKernel> forced_kernel() {
  static const auto forced = []() -> std::optional<QuantizedKernel> {
    const char* text = std::getenv("FERRY_QUANTIZED_KERNEL");
    if (!text || !*text) return {};
    for (const auto& [kernel, word] : kNames) {
      bool on_cpu = kernel != QuantizedKernel::int8_mm && kernel != QuantizedKernel::float8_mm;
      if (word == text && on_cpu) return kernel;
    }
    throw_error<ArgumentError>(
        "FERRY_QUANTIZED_KERNEL: got '{}', expected dequantize, dequantize_blocks, upcast_blocks, "
        "int8_blocks or int8_as_float",
        text);
  }();
  return forced;
}

}  // namespace

std::string_view name(QuantizedKernel kernel) {
  return kNames[static_cast<size_t>(kernel)].second;
}

QuantizedKernelChoice choose_quantized_kernel(const QuantizedCase& what,
                                              const CpuFeatures& features) {
  using enum QuantizedKernel;
  if (what.records_gradient) return {dequantize, "a gradient is recorded"};
  if (!what.device.is_cpu()) return choose_on_accelerator(what);
  if (what.dtype != at::kFloat && what.dtype != at::kBFloat16 && what.dtype != at::kHalf) {
    return {dequantize, "the input is neither float32, bfloat16 nor float16"};
  }
  if (what.activation == Activation::int8_per_token && what.matrix == at::kChar) {
    return int8_instructions(features)
               ? QuantizedKernelChoice{int8_blocks, "the CPU has dot products of int8"}
               : QuantizedKernelChoice{int8_as_float,
                                       "the CPU has no dot products of int8, or "
                                       "oneDNN may not use them"};
  }
  if (what.dtype == at::kFloat) return {dequantize_blocks, "the input is float32"};
  LinearKernelChoice plain = choose_linear_kernel(what.device, what.dtype, features);
  return {for_blocks(plain), plain.reason};
}

QuantizedKernelChoice choose_quantized_kernel(const QuantizedCase& what) {
  QuantizedKernelChoice choice = choose_quantized_kernel(what, cpu_features());
  bool blocks = choice.kernel == QuantizedKernel::dequantize_blocks ||
                choice.kernel == QuantizedKernel::upcast_blocks;
  if (blocks && what.dtype != at::kFloat) {
    LinearKernelChoice plain = choose_linear_kernel(what.device, what.dtype);
    choice = {for_blocks(plain), plain.reason};
  }
  std::optional<QuantizedKernel> forced = forced_kernel();
  if (forced && what.device.is_cpu() && !what.records_gradient) {
    bool int8 =
        *forced == QuantizedKernel::int8_blocks || *forced == QuantizedKernel::int8_as_float;
    if (!int8 || (what.activation == Activation::int8_per_token && what.matrix == at::kChar)) {
      choice = {*forced, "FERRY_QUANTIZED_KERNEL"};
    }
  }
  static std::mutex mutex;
  static std::set<std::pair<QuantizedKernel, std::string_view>> logged;
  std::lock_guard lock(mutex);
  if (logged.emplace(choice.kernel, choice.reason).second) {
    log::debug("quantized linear layers on {}: {} kernel ({})", what.device.str(),
               name(choice.kernel), choice.reason);
  }
  return choice;
}

}  // namespace ferry::nn
