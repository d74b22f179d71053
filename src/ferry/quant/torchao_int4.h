// TorchAO's Int4Tensor (packing format "plain"): 4-bit values in groups of a row.
#pragma once

#include "ferry/quant/quantized_weight.h"

namespace ferry::quant {

// Components: "qdata" int8 [out, in / 2], two signed 4-bit values a byte, the low nibble first;
// "scale" and "zero_point" [in / group_size, out], both in the dtype of the weight that was
// quantized. weight = value * scale + zero_point, in float32: the zero point is an offset.
class Int4Weight : public QuantizedWeight {
 public:
  // Throws ArgumentError for an odd number of columns, a group that does not divide them, scales
  // that are no floats, an activation other than as_is and float8_per_token.
  Int4Weight(std::vector<int64_t> shape, int64_t group_size,
             io::Dtype scale_dtype = io::Dtype::BF16, Activation activation = Activation::as_is);

  std::string_view scheme() const override { return "TorchAO int4"; }
  Activation activation() const override { return activation_; }
  int64_t group_size() const { return group_size_; }

  at::Tensor dequantize(ComponentTensors components, at::ScalarType dtype) const override;
  void dequantize_rows(ComponentTensors components, int64_t first, int64_t count,
                       at::ScalarType dtype, void* into) const override;

 private:
  int64_t group_size_;
  Activation activation_;
};

// The components of an Int4Weight.
struct Int4Components {
  at::Tensor qdata, scale, zero_point;
};

// What Int4Tensor.from_hp(weight, [1, group_size]) computes, in float32: scale = (greatest - least)
// / 15, at least 1e-6 / 15; zero point = least + 8 * scale; both are then rounded to the weight's
// dtype. weight: [out, in], float32, bfloat16 or float16. Throws ArgumentError for a group that
// does not divide the row.
Int4Components quantize_int4(const at::Tensor& weight, int64_t group_size);

}  // namespace ferry::quant
