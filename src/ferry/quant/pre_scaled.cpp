#include "ferry/quant/pre_scaled.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include "ferry/base/error.h"
#include "ferry/quant/rows.h"

namespace ferry::quant {

namespace {

std::vector<Component> components_of(const QuantizedWeight& inner, io::Dtype scale_dtype,
                                     const std::vector<int64_t>& scale_shape) {
  const std::vector<int64_t> vector{inner.columns()}, row{1, inner.columns()}, one{1};
  if (scale_shape != vector && scale_shape != row && scale_shape != one) {
    throw_error<ArgumentError>("act_pre_scale: got shape [{}], expected [{}]",
                               fmt::join(scale_shape, ", "), inner.columns());
  }
  if (scale_dtype != io::Dtype::F32 && scale_dtype != io::Dtype::BF16 &&
      scale_dtype != io::Dtype::F16) {
    throw_error<ArgumentError>("act_pre_scale: got {}, expected F32, BF16 or F16",
                               io::name(scale_dtype));
  }
  std::vector<Component> components = inner.components();
  components.push_back({"act_pre_scale", scale_dtype, scale_shape});
  return components;
}

}  // namespace

PreScaledWeight::PreScaledWeight(std::shared_ptr<const QuantizedWeight> inner,
                                 io::Dtype scale_dtype, std::vector<int64_t> scale_shape)
    : QuantizedWeight(inner->shape().vec(), components_of(*inner, scale_dtype, scale_shape)),
      inner_(inner) {}

at::Tensor PreScaledWeight::dequantize(ComponentTensors components, at::ScalarType dtype) const {
  at::Tensor scale = components.back().to(at::kFloat).reshape({1, -1});
  return (inner_->dequantize(components.first(components.size() - 1), at::kFloat) * scale)
      .to(dtype);
}

void PreScaledWeight::dequantize_rows(ComponentTensors components, int64_t first, int64_t count,
                                      at::ScalarType dtype, void* into) const {
  const ComponentTensors inner = components.first(components.size() - 1);
  const FloatView scales(components.back());
  const bool one = components.back().numel() == 1;
  write_rows(first, count, columns(), dtype, into, [&](int64_t row, float* out) {
    inner_->dequantize_rows(inner, row, 1, at::kFloat, out);
    for (int64_t k = 0; k < columns(); ++k) out[k] *= scales[one ? 0 : k];
  });
}

StoredQuantized PreScaledWeight::rows_of(const std::vector<weights::StoredTensor>& stored,
                                         int64_t first, int64_t count) const {
  StoredQuantized cut = inner_->rows_of({stored.begin(), stored.end() - 1}, first, count);
  const Component& scale = QuantizedWeight::components().back();
  cut.weight = std::make_shared<PreScaledWeight>(cut.weight, scale.dtype, scale.shape);
  cut.components.push_back(stored.back());
  return cut;
}

}  // namespace ferry::quant
