// torch.nn.Linear with hooks and without memory at construction.
#pragma once

#include "ferry/nn/module.h"
#include "ferry/quant/quantized_weight.h"

namespace ferry::nn {

class Linear : public Module {
 public:
  Linear(int64_t in_features, int64_t out_features, bool with_bias = true);

  // [..., in_features] -> [..., out_features]; the kernel is chosen in linear_kernels.h, for a
  // quantized weight in quantized_linear.h.
  at::Tensor forward(const at::Tensor& x);

  // From now on the weight is held quantized: its components are buffers ("weight_scale"), stubs
  // until they are loaded, and `weight` is undefined. Throws ArgumentError for another shape,
  // or where it is quantized already.
  void set_quantized_weight(std::shared_ptr<const quant::QuantizedWeight> quantized);
  // Null where the weight is a plain tensor.
  const std::shared_ptr<const quant::QuantizedWeight>& quantized_weight() const {
    return quantized_;
  }
  quant::ComponentTensors components() const { return components_; }

  int64_t in_features() const { return in_features_; }
  int64_t out_features() const { return out_features_; }

  at::Tensor weight;  // [out_features, in_features]; undefined where it is quantized
  at::Tensor bias;    // [out_features], or undefined

 protected:
  bool keeps_dtype(const std::string& tensor) const override;

 private:
  int64_t in_features_;
  int64_t out_features_;
  std::shared_ptr<const quant::QuantizedWeight> quantized_;
  std::vector<at::Tensor> components_;
};

}  // namespace ferry::nn
