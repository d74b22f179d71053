#include "ferry/quant/bitsandbytes_int8.h"

#include <ATen/ATen.h>

#include "ferry/quant/rows.h"

namespace ferry::quant {

namespace {

constexpr float kOneOver127 = 7.874015718698502e-3f;  // bitsandbytes multiplies; it does not divide

}  // namespace

BitsAndBytesInt8Weight::BitsAndBytesInt8Weight(const std::vector<int64_t>& shape)
    : QuantizedWeight(shape,
                      {{"qdata", io::Dtype::I8, shape}, {"SCB", io::Dtype::F32, {shape[0]}}}) {}

at::Tensor BitsAndBytesInt8Weight::dequantize(ComponentTensors components,
                                              at::ScalarType dtype) const {
  at::Tensor values = components[0].to(at::kFloat) * components[1].unsqueeze(1) * kOneOver127;
  return values.to(dtype);
}

void BitsAndBytesInt8Weight::dequantize_rows(ComponentTensors components, int64_t first,
                                             int64_t count, at::ScalarType dtype,
                                             void* into) const {
  const auto* values = components[0].const_data_ptr<int8_t>();
  const float* greatest = components[1].const_data_ptr<float>();
  write_rows(first, count, columns(), dtype, into, [&](int64_t row, float* out) {
    const int8_t* in = values + row * columns();
    for (int64_t k = 0; k < columns(); ++k)
      out[k] = static_cast<float>(in[k]) * greatest[row] * kOneOver127;
  });
}

std::shared_ptr<const QuantizedWeight> BitsAndBytesInt8Weight::with_rows(int64_t rows) const {
  return std::make_shared<BitsAndBytesInt8Weight>(std::vector<int64_t>{rows, columns()});
}

}  // namespace ferry::quant
