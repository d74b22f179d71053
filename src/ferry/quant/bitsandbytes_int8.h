// bitsandbytes' int8 weights (LLM.int8()).
#pragma once

#include "ferry/quant/quantized_weight.h"

namespace ferry::quant {

// Components: "qdata" int8 [out, in]; "SCB" float32 [out], each row's greatest magnitude.
// weight = qdata * SCB * (1 / 127), in float32.
class BitsAndBytesInt8Weight : public QuantizedWeight {
 public:
  explicit BitsAndBytesInt8Weight(const std::vector<int64_t>& shape);

  std::string_view scheme() const override { return "bitsandbytes int8"; }

  at::Tensor dequantize(ComponentTensors components, at::ScalarType dtype) const override;
  void dequantize_rows(ComponentTensors components, int64_t first, int64_t count,
                       at::ScalarType dtype, void* into) const override;

 protected:
  std::shared_ptr<const QuantizedWeight> with_rows(int64_t rows) const override;
};

}  // namespace ferry::quant
