#include "ferry/nn/linear.h"

#include <algorithm>

#include "ferry/base/error.h"
#include "ferry/nn/linear_kernels.h"
#include "ferry/nn/quantized_linear.h"
#include "ferry/tensor/dtype.h"

namespace ferry::nn {

Linear::Linear(int64_t in_features, int64_t out_features, bool with_bias)
    : in_features_(in_features), out_features_(out_features) {
  weight = stub_parameter("weight", {out_features, in_features});
  if (with_bias) bias = stub_parameter("bias", {out_features});
}

void Linear::set_quantized_weight(std::shared_ptr<const quant::QuantizedWeight> quantized) {
  if (quantized->shape() != at::IntArrayRef({out_features_, in_features_})) {
    throw_error<ArgumentError>("quantized weight: got [{}, {}], expected [{}, {}]",
                               quantized->rows(), quantized->columns(), out_features_,
                               in_features_);
  }
  if (quantized_) throw_error<ArgumentError>("the layer is quantized already");
  parameters_.erase("weight");
  weight = at::Tensor();
  quantized_ = std::move(quantized);
  for (const quant::Component& component : quantized_->components()) {
    components_.push_back(stub_buffer("weight_" + component.name, component.shape,
                                      tensor::to_torch(component.dtype)));
  }
}

bool Linear::keeps_dtype(const std::string& tensor) const {
  if (!quantized_) return false;
  const auto& all = quantized_->components();
  return std::any_of(all.begin(), all.end(), [&](const quant::Component& component) {
    return tensor == "weight_" + component.name;
  });
}

at::Tensor Linear::forward(const at::Tensor& x) {
  if (quantized_) return quantized_linear(x, *quantized_, components_, bias);
  return nn::linear(x, weight, bias);
}

}  // namespace ferry::nn
