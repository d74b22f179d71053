// A quantized weight whose input is multiplied by a vector first, as AWQ and SmoothQuant leave it
// (TorchAO's act_pre_scale): the vector is folded into the weight's columns.
#pragma once

#include "ferry/quant/quantized_weight.h"

namespace ferry::quant {

// Components: those of `inner`, and "act_pre_scale" with one value a column.
// (x * act_pre_scale) W^T = x (W * act_pre_scale)^T: weight = inner's in float32 * act_pre_scale.
// The input stays as it is, also where `inner` would have it quantized.
class PreScaledWeight : public QuantizedWeight {
 public:
  // scale_shape: [in], [1, in] or [1]. Throws ArgumentError for another one, or a scale that is no
  // float.
  PreScaledWeight(std::shared_ptr<const QuantizedWeight> inner, io::Dtype scale_dtype,
                  std::vector<int64_t> scale_shape);

  std::string_view scheme() const override { return inner_->scheme(); }

  at::Tensor dequantize(ComponentTensors components, at::ScalarType dtype) const override;
  void dequantize_rows(ComponentTensors components, int64_t first, int64_t count,
                       at::ScalarType dtype, void* into) const override;
  StoredQuantized rows_of(const std::vector<weights::StoredTensor>& stored, int64_t first,
                          int64_t count) const override;

 private:
  std::shared_ptr<const QuantizedWeight> inner_;
};

}  // namespace ferry::quant
