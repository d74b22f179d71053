// TorchAO's IntxUnpackedToInt8Tensor: values of 1 to 8 bits, one a byte.
#pragma once

#include "ferry/quant/quantized_weight.h"

namespace ferry::quant {

// Components: "qdata" int8 [out, in]; "scale" and "zero_point" [out / block[0], in / block[1]], the
// scale in a floating-point dtype, the zero point in one or int8.
// weight = (qdata - zero_point) * scale, in float32.
class IntxWeight : public QuantizedWeight {
 public:
  // block_size: rows and columns that share a scale. Throws ArgumentError for a block that does not
  // divide the shape, or other dtypes.
  IntxWeight(std::vector<int64_t> shape, std::vector<int64_t> block_size, io::Dtype scale_dtype,
             io::Dtype zero_point_dtype);

  std::string_view scheme() const override { return "TorchAO intx"; }

  at::Tensor dequantize(ComponentTensors components, at::ScalarType dtype) const override;
  void dequantize_rows(ComponentTensors components, int64_t first, int64_t count,
                       at::ScalarType dtype, void* into) const override;

 protected:
  std::shared_ptr<const QuantizedWeight> with_rows(int64_t rows) const override;

 private:
  std::vector<int64_t> block_size_;
};

}  // namespace ferry::quant
