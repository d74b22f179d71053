#include "ferry/nn/quantized_linear.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cstddef>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/quant/row_kernels.h"

namespace ferry::nn {

namespace {

using quant::Activation;
using quant::ComponentTensors;
using quant::QuantizedWeight;
using quant::ScaledMatrix;

// Widened pieces of the input: larger than blocks of weights, since each reads all weights again.
constexpr int64_t kInputBlockBytes = 32 << 20;
// Rows of the input that share one pass over int8 weights.
constexpr int64_t kInt8Rows = 4096;
constexpr int64_t kFewestRows = 16;
// Rows of the input with which a weight is better multiplied where it is dequantized.
constexpr int64_t kFewRows = 4;
constexpr double kFloat8Max = 448.0;  // e4m3

// Whether the device multiplies matrices of `type`, asked once for each device.
bool multiplies(at::Device device, at::ScalarType type) {
  static std::mutex mutex;
  static std::map<std::pair<std::string, at::ScalarType>, bool> known;
  std::lock_guard lock(mutex);
  auto [entry, added] = known.try_emplace({device.str(), type}, false);
  if (!added) return entry->second;
  try {
    at::Tensor a = at::zeros({32, 32}, at::TensorOptions().device(device)).to(type);
    if (type == at::kChar) {
      at::_int_mm(a, a.t());
    } else {
      at::Tensor one = at::ones({}, at::TensorOptions().device(device));
      at::_scaled_mm(a, a.t(), one, one, {}, {}, at::kBFloat16);
    }
    entry->second = true;
  } catch (const c10::Error& error) {
    log::debug("{}: no product of {} matrices: {}", device.str(), c10::toString(type),
               error.what_without_backtrace());
  }
  return entry->second;
}

QuantizedCase case_of(const at::Tensor& x, const QuantizedWeight& weight,
                      const std::optional<ScaledMatrix>& matrix, const at::Tensor& bias) {
  QuantizedCase what{.device = x.device(), .activation = weight.activation()};
  what.x_rows = x.numel() / weight.columns();
  what.in_features = weight.columns();
  what.out_features = weight.rows();
  what.dtype = x.scalar_type();
  what.records_gradient = records_gradient(x, bias);
  if (matrix) {
    what.matrix = matrix->values.scalar_type();
    what.scale_per_row = matrix->scale.numel() > 1;
    what.multiplies_matrix = !x.is_cpu() && multiplies(x.device(), what.matrix);
  }
  return what;
}

// One scale a row of x, or for all of it, and the whole numbers in float32.
std::pair<at::Tensor, at::Tensor> int8_of(const at::Tensor& x) {
  at::Tensor scale = (x.abs().amax({-1}, /*keepdim=*/true) / 127.5).clamp_min(0x1p-23);
  scale = scale.to(at::kFloat);
  return {(x * scale.reciprocal()).round().clamp(-128, 127), scale};
}

std::pair<at::Tensor, at::Tensor> float8_of(const at::Tensor& x, Activation activation) {
  at::Tensor most = activation == Activation::float8_per_token
                        ? x.abs().amax({-1}, /*keepdim=*/true)
                        : x.abs().amax();
  at::Tensor scale = (most / kFloat8Max).to(at::kFloat);
  // Zeros have no scale; torchao divides by it and gets NaN.
  scale = at::where(scale == 0, at::ones_like(scale), scale);
  at::Tensor values = (x.to(at::kFloat) / scale).clamp(-kFloat8Max, kFloat8Max);
  return {values.to(at::kFloat8_e4m3fn), scale};
}

// x as the product sees it, in its own dtype again. Its gradient is that of x.
at::Tensor quantized_and_back(const at::Tensor& x, Activation activation) {
  if (activation == Activation::as_is || x.numel() == 0) return x;
  at::Tensor plain = x.detach();
  auto [values, scale] =
      activation == Activation::int8_per_token ? int8_of(plain) : float8_of(plain, activation);
  at::Tensor back = (values.to(at::kFloat) * scale).to(x.scalar_type());
  return x.requires_grad() ? x + (back - plain) : back;
}

int64_t rows_within(int64_t bytes, int64_t row_bytes, int64_t rows) {
  int64_t fit = std::max(kFewestRows, bytes / std::max<int64_t>(1, row_bytes));
  if (fit > 64) fit -= fit % 64;
  return std::min(fit, rows);
}

int64_t scratch_bytes_now() {
  return scratch_bytes(at::get_num_threads());
}

void dequantize_block(const QuantizedWeight& weight, ComponentTensors components, int64_t first,
                      const at::Tensor& block) {
  auto* into = static_cast<std::byte*>(block.mutable_data_ptr());
  int64_t row_bytes = block.stride(0) * static_cast<int64_t>(block.itemsize());
  int64_t grain = std::max<int64_t>(1, 65536 / weight.columns());
  at::parallel_for(0, block.size(0), grain, [&](int64_t begin, int64_t end) {
    weight.dequantize_rows(components, first + begin, end - begin, block.scalar_type(),
                           into + begin * row_bytes);
  });
}

void multiply(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
              at::Tensor into) {
  if (bias.defined()) {
    at::addmm_out(into, bias, x, weight.t());
  } else {
    at::mm_out(into, x, weight.t());
  }
}

at::Tensor part(const at::Tensor& bias, int64_t first, int64_t count) {
  return bias.defined() ? bias.narrow(0, first, count) : bias;
}

// For a row or a few (a model's modulations): time goes into the weights' bytes, so that each
// thread multiplies rows of the weight while they are in its cache. Blocks do not depend on the
// number of threads.
void multiply_few_rows(const at::Tensor& x, const QuantizedWeight& weight,
                       ComponentTensors components, const at::Tensor& bias, const at::Tensor& out) {
  constexpr int64_t kRows = 64;
  const int64_t columns = weight.columns(), blocks = (weight.rows() + kRows - 1) / kRows;
  at::Tensor wide_x = x.to(at::kFloat).contiguous();
  at::Tensor wide_bias = bias.defined() ? bias.to(at::kFloat) : bias;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    at::NoGradGuard no_grad;
    c10::InferenceMode as_caller(out.is_inference());  // a thread of the pool knows nothing of it
    at::Tensor scratch = at::empty({kRows, columns}, wide_x.options());
    for (int64_t first = begin * kRows; first < std::min(end * kRows, weight.rows());
         first += kRows) {
      const int64_t count = std::min(kRows, weight.rows() - first);
      at::Tensor block = scratch.narrow(0, 0, count);
      weight.dequantize_rows(components, first, count, at::kFloat, block.mutable_data_ptr());
      at::Tensor product = at::empty({x.size(0), count}, wide_x.options());
      multiply(wide_x, block, part(wide_bias, first, count), product);
      out.narrow(1, first, count).copy_(product);
    }
  });
}

void multiply_dequantized(const at::Tensor& x, const QuantizedWeight& weight,
                          ComponentTensors components, const at::Tensor& bias,
                          const at::Tensor& out) {
  int64_t row_bytes = weight.columns() * static_cast<int64_t>(x.itemsize());
  int64_t step = rows_within(scratch_bytes_now(), row_bytes, weight.rows());
  at::Tensor scratch = at::empty({step, weight.columns()}, x.options());
  for (int64_t first = 0; first < weight.rows(); first += step) {
    int64_t count = std::min(step, weight.rows() - first);
    at::Tensor block = scratch.narrow(0, 0, count);
    dequantize_block(weight, components, first, block);
    multiply(x, block, part(bias, first, count), out.narrow(1, first, count));
  }
}

void multiply_upcast(const at::Tensor& x, const QuantizedWeight& weight,
                     ComponentTensors components, const at::Tensor& bias, const at::Tensor& out) {
  const int64_t columns = weight.columns(), wide_bytes = columns * int64_t{sizeof(float)};
  const int64_t step = rows_within(scratch_bytes_now(), wide_bytes, weight.rows());
  const int64_t x_step = rows_within(kInputBlockBytes, wide_bytes, x.size(0));
  at::TensorOptions wide = x.options().dtype(at::kFloat);
  at::Tensor scratch = at::empty({step, columns}, wide);
  at::Tensor wide_bias = bias.defined() ? bias.to(at::kFloat) : bias;
  for (int64_t row = 0; row < x.size(0); row += x_step) {
    int64_t rows = std::min(x_step, x.size(0) - row);
    at::Tensor wide_x = x.narrow(0, row, rows).to(at::kFloat);
    for (int64_t first = 0; first < weight.rows(); first += step) {
      int64_t count = std::min(step, weight.rows() - first);
      at::Tensor block = scratch.narrow(0, 0, count);
      dequantize_block(weight, components, first, block);
      at::Tensor product = at::empty({rows, count}, wide);
      multiply(wide_x, block, part(wide_bias, first, count), product);
      out.narrow(0, row, rows).narrow(1, first, count).copy_(product);
    }
  }
}

// x quantized row by row, and what scales a block of products.
struct Int8Input {
  at::Tensor values;  // int8 [rows, in]
  std::vector<float> scales;
};

Int8Input quantize_rows(const at::Tensor& x) {
  at::Tensor rows = x.contiguous();
  Int8Input input{at::empty(x.sizes(), x.options().dtype(at::kChar)),
                  std::vector<float>(x.size(0))};
  const quant::RowKernels& kernels = quant::row_kernels(x.scalar_type());
  const auto* from = static_cast<const std::byte*>(rows.const_data_ptr());
  auto* into = input.values.mutable_data_ptr<int8_t>();
  const int64_t columns = x.size(1), row_bytes = columns * static_cast<int64_t>(x.itemsize());
  at::parallel_for(0, x.size(0), 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      input.scales[row] =
          kernels.quantize_int8(from + row * row_bytes, columns, into + row * columns);
    }
  });
  return input;
}

// Rows of int8 as whole numbers in float32.
at::Tensor whole_numbers(const at::Tensor& values, const at::Tensor& scratch) {
  at::Tensor into = scratch.narrow(0, 0, values.size(0));
  const auto& kernels = quant::row_kernels(at::kFloat);
  const float one = 1.0F;
  const int64_t columns = values.size(1);
  at::parallel_for(0, values.size(0), 16, [&](int64_t begin, int64_t end) {
    kernels.int8(values.const_data_ptr<int8_t>() + begin * columns, &one, nullptr,
                 (end - begin) * columns, (end - begin) * columns,
                 into.mutable_data_ptr<float>() + begin * columns);
  });
  return into;
}

void multiply_int8(const at::Tensor& x, const ScaledMatrix& weight, const at::Tensor& bias,
                   const at::Tensor& out, bool as_float) {
  const int64_t in = x.size(1), columns = weight.values.size(0), budget = scratch_bytes_now();
  const int64_t wide_bytes = in * int64_t{sizeof(float)};
  Int8Input input = quantize_rows(x);
  at::Tensor values = weight.values.contiguous();
  at::Tensor scales = weight.scale.reshape({-1}).expand({columns}).contiguous();
  at::Tensor offsets = bias.defined() ? bias.to(x.scalar_type()).contiguous() : bias;
  const int64_t row_step = as_float ? rows_within(kInputBlockBytes, wide_bytes, x.size(0))
                                    : std::min(kInt8Rows, x.size(0));
  int64_t step = rows_within(budget, row_step * int64_t{sizeof(int32_t)}, columns);
  if (as_float) step = std::min(step, rows_within(budget, wide_bytes, columns));
  at::TensorOptions wide = x.options().dtype(at::kFloat);
  at::Tensor scratch = at::empty({row_step * step}, wide.dtype(as_float ? at::kFloat : at::kInt));
  at::Tensor wide_x = as_float ? at::empty({row_step, in}, wide) : at::Tensor();
  at::Tensor wide_weight = as_float ? at::empty({step, in}, wide) : at::Tensor();

  const quant::RowKernels& kernels = quant::row_kernels(x.scalar_type());
  const auto item = static_cast<int64_t>(x.itemsize());
  for (int64_t row = 0; row < x.size(0); row += row_step) {
    const int64_t rows = std::min(row_step, x.size(0) - row);
    at::Tensor x_rows = input.values.narrow(0, row, rows);
    if (as_float) x_rows = whole_numbers(x_rows, wide_x);
    for (int64_t first = 0; first < columns; first += step) {
      const int64_t count = std::min(step, columns - first);
      at::Tensor products = scratch.narrow(0, 0, rows * count).view({rows, count});
      at::Tensor block = values.narrow(0, first, count);
      if (as_float) {
        at::mm_out(products, x_rows, whole_numbers(block, wide_weight).t());
      } else {
        at::_int_mm_out(products, x_rows, block.t());
      }
      auto* into = static_cast<std::byte*>(out.mutable_data_ptr()) + (row * columns + first) * item;
      const auto* offset =
          bias.defined() ? static_cast<const std::byte*>(offsets.const_data_ptr()) + first * item
                         : nullptr;
      const float* scale = scales.const_data_ptr<float>() + first;
      at::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          void* to = into + i * columns * item;
          if (as_float) {
            kernels.scale_float(products.const_data_ptr<float>() + i * count, input.scales[row + i],
                                scale, offset, count, to);
          } else {
            kernels.scale_int32(products.const_data_ptr<int32_t>() + i * count,
                                input.scales[row + i], scale, offset, count, to);
          }
        }
      });
    }
  }
}

// x: [rows, in].
at::Tensor multiply_on_accelerator(QuantizedKernel kernel, const at::Tensor& x,
                                   const QuantizedWeight& weight, const ScaledMatrix& matrix,
                                   const at::Tensor& bias) {
  if (kernel == QuantizedKernel::int8_mm) {
    auto [values, scale] = int8_of(x);
    at::Tensor products = at::_int_mm(values.to(at::kChar), matrix.values.t());
    at::Tensor out =
        (products.to(at::kFloat) * scale).to(x.scalar_type()) * matrix.scale.view({-1});
    return (bias.defined() ? out + bias : out).to(x.scalar_type());
  }
  auto [values, scale] = float8_of(x, weight.activation());
  return at::_scaled_mm(
      values, matrix.values.t(), scale,
      matrix.scale.numel() > 1 ? matrix.scale.view({1, -1}) : matrix.scale.view({}),
      optional_tensor(bias), {}, x.scalar_type(), /*use_fast_accum=*/true);
}

at::Tensor run(QuantizedKernel kernel, const at::Tensor& x, const QuantizedWeight& weight,
               ComponentTensors components, const std::optional<ScaledMatrix>& matrix,
               const at::Tensor& bias) {
  using enum QuantizedKernel;
  if (kernel == dequantize) {
    return linear(quantized_and_back(x, weight.activation()),
                  weight.dequantize(components, x.scalar_type()), bias);
  }
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.rows();
  at::Tensor rows = x.reshape({-1, weight.columns()});
  if (kernel == int8_mm || kernel == float8_mm) {
    return multiply_on_accelerator(kernel, rows, weight, *matrix, bias).view(shape);
  }
  at::Tensor out = at::empty({rows.size(0), weight.rows()}, x.options());
  if (rows.size(0) == 0) return out.view(shape);
  if (kernel == int8_blocks || kernel == int8_as_float) {
    multiply_int8(rows, *matrix, bias, out, kernel == int8_as_float);
    return out.view(shape);
  }
  rows = quantized_and_back(rows, weight.activation());
  if (rows.size(0) <= kFewRows) {
    multiply_few_rows(rows, weight, components, bias, out);
  } else if (kernel == upcast_blocks) {
    multiply_upcast(rows, weight, components, bias, out);
  } else {
    multiply_dequantized(rows, weight, components, bias, out);
  }
  return out.view(shape);
}

}  // namespace

int64_t scratch_bytes(int threads) {
  return std::max<int64_t>(16, 2 * int64_t{threads}) << 20;
}

at::Tensor quantized_linear(const at::Tensor& x, const QuantizedWeight& weight,
                            ComponentTensors components, const at::Tensor& bias) {
  std::optional<ScaledMatrix> matrix;
  if (weight.activation() != Activation::as_is) matrix = weight.as_scaled_matrix(components);
  QuantizedKernel kernel = choose_quantized_kernel(case_of(x, weight, matrix, bias)).kernel;
  return run(kernel, x, weight, components, matrix, bias);
}

at::Tensor quantized_linear_with(QuantizedKernel kernel, const at::Tensor& x,
                                 const QuantizedWeight& weight, ComponentTensors components,
                                 const at::Tensor& bias) {
  std::optional<ScaledMatrix> matrix = weight.as_scaled_matrix(components);
  if (!matrix && kernel != QuantizedKernel::dequantize &&
      kernel != QuantizedKernel::dequantize_blocks && kernel != QuantizedKernel::upcast_blocks) {
    throw_error<ArgumentError>("{}: {} cannot be multiplied as it is", name(kernel),
                               weight.scheme());
  }
  return run(kernel, x, weight, components, matrix, bias);
}

}  // namespace ferry::nn
