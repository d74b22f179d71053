#include "ferry/quant/float8.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include "ferry/base/error.h"
#include "ferry/quant/float_codes.h"
#include "ferry/quant/row_kernels.h"
#include "ferry/quant/rows.h"

namespace ferry::quant {

namespace {

std::vector<Component> components_of(const std::vector<int64_t>& shape,
                                     const Float8Weight::Options& options) {
  std::vector<Component> components{{"qdata", options.dtype, shape}};
  if (options.scale_shape) components.push_back({"scale", io::Dtype::F32, *options.scale_shape});
  return components;
}

}  // namespace

Float8Weight::Float8Weight(std::vector<int64_t> shape, Options options)
    : QuantizedWeight(shape, components_of(shape, options)), options_(std::move(options)) {
  if (options_.dtype != io::Dtype::F8_E4M3 && options_.dtype != io::Dtype::F8_E5M2) {
    throw_error<ArgumentError>("float8 weight: got values of {}, expected F8_E4M3 or F8_E5M2",
                               io::name(options_.dtype));
  }
  if (options_.activation == Activation::int8_per_token)
    throw_error<ArgumentError>("float8 weight: its input cannot be quantized to int8");
  if (!options_.scale_shape) return;
  const std::vector<int64_t>& scale = *options_.scale_shape;
  if (!scale.empty()) scale_rows_ = scale[0];
  if (scale.size() == 2) scale_columns_ = scale[1];
  if (scale.size() > 2 || scale_rows_ < 1 || scale_columns_ < 1 || rows() % scale_rows_ != 0 ||
      columns() % scale_columns_ != 0) {
    throw_error<ArgumentError>("float8 weight: scales of shape [{}] do not divide [{}, {}]",
                               fmt::join(scale, ", "), rows(), columns());
  }
}

at::Tensor Float8Weight::dequantize(ComponentTensors components, at::ScalarType dtype) const {
  at::Tensor values = components[0].to(at::kFloat);
  if (options_.scale_shape) {
    values = values *
             expand_blocks(components[1].view({scale_rows_, scale_columns_}), rows(), columns());
  }
  return values.to(dtype);
}

void Float8Weight::dequantize_rows(ComponentTensors components, int64_t first, int64_t count,
                                   at::ScalarType dtype, void* into) const {
  const RowKernels& kernels = row_kernels(dtype);
  const auto kernel =
      options_.dtype == io::Dtype::F8_E4M3 ? kernels.float8_e4m3 : kernels.float8_e5m2;
  const auto* codes = static_cast<const uint8_t*>(components[0].const_data_ptr());
  const float one = 1;
  const float* scales = options_.scale_shape ? components[1].const_data_ptr<float>() : nullptr;
  auto* out = static_cast<std::byte*>(into);
  for (int64_t row = first; row < first + count; ++row) {
    const float* scale = scales ? scales + row / block_rows() * scale_columns_ : &one;
    kernel(codes + row * columns(), scale, block_columns(), columns(), out);
    out += columns() * c10::elementSize(dtype);
  }
}

std::optional<ScaledMatrix> Float8Weight::as_scaled_matrix(ComponentTensors components) const {
  const bool by_row = scale_columns_ == 1 && (scale_rows_ == rows() || scale_rows_ == 1);
  if (!options_.scale_shape || !by_row || options_.activation == Activation::as_is) return {};
  return ScaledMatrix{components[0], components[1].view({scale_rows_, 1})};
}

std::shared_ptr<const QuantizedWeight> Float8Weight::with_rows(int64_t rows) const {
  Options options = options_;
  if (scale_rows_ != 1) {
    if (scale_rows_ != this->rows()) return nullptr;
    (*options.scale_shape)[0] = rows;
  }
  return std::make_shared<Float8Weight>(std::vector<int64_t>{rows, columns()}, std::move(options));
}

Float8Components quantize_float8_rows(const at::Tensor& weight) {
  at::Tensor source = weight.detach();
  at::Tensor scale = (source.abs().amax(1, /*keepdim=*/true) / 448.0).to(at::kFloat);
  at::Tensor divisor = scale.masked_fill(scale == 0, 1);
  at::Tensor values = (source.to(at::kFloat) / divisor).clamp(-448.0, 448.0);
  return {values.to(at::kFloat8_e4m3fn), scale};
}

}  // namespace ferry::quant
