// What the schemes' dequantize_rows() have in common.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "ferry/base/error.h"

namespace ferry::quant {

// The elements of a contiguous float32, bfloat16, float16 or int8 tensor as floats: scales come in
// the dtype of the weight that was quantized.
class FloatView {
 public:
  explicit FloatView(const at::Tensor& tensor)
      : data_(tensor.const_data_ptr()), dtype_(tensor.scalar_type()) {}

  float operator[](int64_t index) const {
    switch (dtype_) {
      case at::kFloat:
        return static_cast<const float*>(data_)[index];
      case at::kBFloat16:
        return static_cast<const c10::BFloat16*>(data_)[index];
      case at::kHalf:
        return static_cast<const c10::Half*>(data_)[index];
      case at::kChar:
        return static_cast<const int8_t*>(data_)[index];
      default:
        throw_error<ArgumentError>("scale: got {}, expected float32, bfloat16, float16 or int8",
                                   c10::toString(dtype_));
    }
  }

 private:
  const void* data_;
  at::ScalarType dtype_;
};

// Makes rows `first` to `first + count` with make_row(row, float* values), `columns` floats each,
// and rounds each value once into `into`, [count, columns] of float32, bfloat16 or float16.
template <class MakeRow>
void write_rows(int64_t first, int64_t count, int64_t columns, at::ScalarType dtype, void* into,
                const MakeRow& make_row) {
  if (dtype == at::kFloat) {
    auto* out = static_cast<float*>(into);
    for (int64_t i = 0; i < count; ++i) make_row(first + i, out + i * columns);
    return;
  }
  if (dtype != at::kBFloat16 && dtype != at::kHalf) {
    throw_error<ArgumentError>("dequantize: got {}, expected float32, bfloat16 or float16",
                               c10::toString(dtype));
  }
  std::vector<float> values(columns);
  for (int64_t i = 0; i < count; ++i) {
    make_row(first + i, values.data());
    auto round_into = [&](auto* out) {
      for (int64_t k = 0; k < columns; ++k) out[i * columns + k] = values[k];
    };
    if (dtype == at::kBFloat16) {
      round_into(static_cast<c10::BFloat16*>(into));
    } else {
      round_into(static_cast<c10::Half*>(into));
    }
  }
}

}  // namespace ferry::quant
