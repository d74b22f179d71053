// TorchAO's Int4TilePackedTo4dTensor: 4-bit values in the order that CUDA's `_weight_int4pack_mm`
// reads them in ("tinygemm").
#pragma once

#include "ferry/quant/quantized_weight.h"

namespace ferry::quant {

// out is padded to a multiple of 8, in to one of 1024. Components: "qdata" int32 [out / 8, in /
// 128, 32, 4]; "scale_and_zero" bfloat16 [in / group_size, out, 2].
// weight = (value - 8) * scale + zero, in float32, values 0 to 15.
class Int4TilePackedWeight : public QuantizedWeight {
 public:
  // shape: without padding. Throws ArgumentError for a group that does not divide 1024.
  Int4TilePackedWeight(std::vector<int64_t> shape, int64_t group_size);

  std::string_view scheme() const override { return "TorchAO int4, tile-packed"; }
  int64_t group_size() const { return group_size_; }

  at::Tensor dequantize(ComponentTensors components, at::ScalarType dtype) const override;
  void dequantize_rows(ComponentTensors components, int64_t first, int64_t count,
                       at::ScalarType dtype, void* into) const override;

 private:
  int64_t group_size_;
};

}  // namespace ferry::quant
