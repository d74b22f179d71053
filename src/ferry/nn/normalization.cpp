#include "ferry/nn/normalization.h"

#include <ATen/ATen.h>

#include "ferry/base/error.h"

namespace ferry::nn {

at::Tensor add_to_product(at::Tensor product, const at::Tensor& other) {
  // In place is safe for autograd too: a product's backward needs its factors, not its result.
  if (product.scalar_type() == other.scalar_type()) return product.add_(other);
  return product + other;
}

at::Tensor modulate(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift) {
  return add_to_product(x * (scale.unsqueeze(1) + 1), shift.unsqueeze(1));
}

AdaLayerNormZero::AdaLayerNormZero(int64_t embedding_dim, bool with_bias) {
  linear = register_module("linear", make<Linear>(embedding_dim, 6 * embedding_dim, with_bias));
  norm =
      register_module("norm", make<LayerNorm>(embedding_dim, 1e-6, /*elementwise_affine=*/false));
}

AdaLayerNormZero::Output AdaLayerNormZero::forward(const at::Tensor& x, const at::Tensor& emb) {
  auto parts = linear(at::silu(emb)).chunk(6, 1);  // [batch, dim] each
  const at::Tensor &shift_msa = parts[0], &scale_msa = parts[1];
  return {modulate(norm(x), scale_msa, shift_msa), parts[2], parts[3], parts[4], parts[5]};
}

AdaLayerNormZeroSingle::AdaLayerNormZeroSingle(int64_t embedding_dim, bool with_bias) {
  linear = register_module("linear", make<Linear>(embedding_dim, 3 * embedding_dim, with_bias));
  norm =
      register_module("norm", make<LayerNorm>(embedding_dim, 1e-6, /*elementwise_affine=*/false));
}

AdaLayerNormZeroSingle::Output AdaLayerNormZeroSingle::forward(const at::Tensor& x,
                                                               const at::Tensor& emb) {
  auto parts = linear(at::silu(emb)).chunk(3, 1);  // shift, scale, gate: [batch, dim] each
  return {modulate(norm(x), parts[1], parts[0]), parts[2]};
}

AdaLayerNormContinuous::AdaLayerNormContinuous(int64_t embedding_dim,
                                               int64_t conditioning_embedding_dim,
                                               bool elementwise_affine, double eps, bool with_bias,
                                               const std::string& norm_type) {
  linear = register_module("linear",
                           make<Linear>(conditioning_embedding_dim, 2 * embedding_dim, with_bias));
  if (norm_type == "layer_norm") {
    layer_norm =
        register_module("norm", make<LayerNorm>(embedding_dim, eps, elementwise_affine, with_bias));
  } else if (norm_type == "rms_norm") {
    rms_norm =
        register_module("norm", make<DiffusersRMSNorm>(embedding_dim, eps, elementwise_affine));
  } else {
    throw_error<ArgumentError>(
        "AdaLayerNormContinuous: norm_type '{}' is unknown; known are layer_norm, rms_norm",
        norm_type);
  }
}

at::Tensor AdaLayerNormContinuous::forward(const at::Tensor& x,
                                           const at::Tensor& conditioning_embedding) {
  // Back to x's dtype: some models condition in float32.
  auto parts = linear(at::silu(conditioning_embedding).to(x.scalar_type())).chunk(2, 1);
  return modulate(layer_norm ? layer_norm(x) : rms_norm(x), parts[0], parts[1]);
}

}  // namespace ferry::nn
