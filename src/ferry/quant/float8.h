// 8-bit floating-point weights: TorchAO's Float8Tensor, ComfyUI's scaled fp8, and plain fp8.
#pragma once

#include <optional>

#include "ferry/quant/quantized_weight.h"

namespace ferry::quant {

// Components: "qdata" F8_E4M3 or F8_E5M2 [out, in], and where there is one "scale", float32.
// weight = float(qdata) * scale, in float32.
class Float8Weight : public QuantizedWeight {
 public:
  struct Options {
    io::Dtype dtype = io::Dtype::F8_E4M3;
    // [] or [1]: one scale. [out]: one a row. [a, b]: one a block of out / a rows and in / b
    // columns. Nothing: the values are the weight.
    std::optional<std::vector<int64_t>> scale_shape = {};
    Activation activation = Activation::as_is;
    std::string scheme = "TorchAO float8";
  };
  // Throws ArgumentError for another dtype, a scale whose shape does not divide the weight's, or an
  // activation that is not as_is or one of the float8 ones.
  Float8Weight(std::vector<int64_t> shape, Options options);

  std::string_view scheme() const override { return options_.scheme; }
  Activation activation() const override { return options_.activation; }
  const Options& options() const { return options_; }
  // Columns and rows that share a scale; all of them where there is none.
  int64_t block_rows() const { return rows() / scale_rows_; }
  int64_t block_columns() const { return columns() / scale_columns_; }

  at::Tensor dequantize(ComponentTensors components, at::ScalarType dtype) const override;
  void dequantize_rows(ComponentTensors components, int64_t first, int64_t count,
                       at::ScalarType dtype, void* into) const override;
  std::optional<ScaledMatrix> as_scaled_matrix(ComponentTensors components) const override;

 protected:
  std::shared_ptr<const QuantizedWeight> with_rows(int64_t rows) const override;

 private:
  Options options_;
  int64_t scale_rows_ = 1;
  int64_t scale_columns_ = 1;
};

// The components of a Float8Weight.
struct Float8Components {
  at::Tensor qdata, scale;
};

// torchao's Float8Tensor.from_hp(weight, granularity=PerRow()), bit for bit: the scale, float32
// [out, 1], is the row's greatest magnitude over 448 in the weight's own dtype. A row of zeros
// stays zeros, where torchao writes NaN (0 / 0). weight: [out, in], float32, bfloat16 or float16.
Float8Components quantize_float8_rows(const at::Tensor& weight);

}  // namespace ferry::quant
