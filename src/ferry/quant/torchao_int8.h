// TorchAO's Int8Tensor: int8 values with a scale, and where it is stored a zero point, for each
// row, group, block or the whole weight; with or without dynamic quantization of the input.
#pragma once

#include "ferry/quant/quantized_weight.h"

namespace ferry::quant {

// Components: "qdata" int8 [out, in], "scale" [out / block[0], in / block[1]] in a floating-point
// dtype, and with `has_zero_point` "zero_point" int8 of the scale's shape.
// weight = (qdata - zero_point) * scale.
class Int8Weight : public QuantizedWeight {
 public:
  // block_size: rows and columns that share a scale: {1, in} a row, {1, g} a group, {out, in} the
  // whole weight. Throws ArgumentError for a shape or a block that is not two positive numbers, a
  // block that does not divide the shape, a scale that is no float, an activation other than as_is
  // and int8_per_token, or int8_per_token with blocks that do not span the row.
  Int8Weight(std::vector<int64_t> shape, std::vector<int64_t> block_size, bool has_zero_point,
             io::Dtype scale_dtype = io::Dtype::F32, Activation activation = Activation::as_is);

  std::string_view scheme() const override;
  Activation activation() const override { return activation_; }
  at::IntArrayRef block_size() const { return block_size_; }
  bool has_zero_point() const { return has_zero_point_; }

  at::Tensor dequantize(ComponentTensors components, at::ScalarType dtype) const override;
  void dequantize_rows(ComponentTensors components, int64_t first, int64_t count,
                       at::ScalarType dtype, void* into) const override;
  std::optional<ScaledMatrix> as_scaled_matrix(ComponentTensors components) const override;

 protected:
  std::shared_ptr<const QuantizedWeight> with_rows(int64_t rows) const override;

 private:
  std::vector<int64_t> block_size_;
  bool has_zero_point_;
  Activation activation_;
};

// The components of an Int8Weight with a zero point and float32 scales.
struct Int8Components {
  at::Tensor qdata, scale, zero_point;
};

// What torchao's Int8Tensor.from_hp(weight, ...) gives with its symmetric mapping, bit for bit: the
// scale is the block's greatest magnitude over 127.5, rounded to the dtype of `weight`, at least
// 2^-23; values are rounded half to even; zero points are zeros. weight: [out, in], float32,
// bfloat16 or float16, on any device. Throws ArgumentError for a block that does not divide it.
Int8Components quantize_int8(const at::Tensor& weight, at::IntArrayRef block_size);

}  // namespace ferry::quant
