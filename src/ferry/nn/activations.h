// Activation functions by the names that configs use (diffusers models/activations.py, transformers
// ACT2FN).
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "ferry/nn/linear.h"

namespace ferry::nn {

using Activation = at::Tensor (*)(const at::Tensor&);

// "silu", "swish", "mish", "gelu", "gelu_tanh", "gelu_new", "gelu_pytorch_tanh", "quick_gelu",
// "relu", "silu_fp32", … in any case. Throws ArgumentError listing what is known.
Activation get_activation(const std::string& name);

// A projection followed by an activation: diffusers' GELU, GEGLU, SwiGLU, ApproximateGELU and
// LinearActivation, which differ in the formula only. The projection is named "proj".
class ActivationProjection : public Module {
 public:
  // Named as FeedForward's activation_fn.
  enum class Kind { gelu, gelu_approximate, geglu, geglu_approximate, swiglu, linear_silu };
  // Throws ArgumentError listing what is known.
  static Kind parse_kind(const std::string& activation_fn);

  ActivationProjection(Kind kind, int64_t dim_in, int64_t dim_out, bool with_bias = true);
  // [..., dim_in] -> [..., dim_out]
  at::Tensor forward(const at::Tensor& hidden_states);

  // [dim_in] -> [dim_out], or 2 * dim_out of the gated kinds (values first, then gates).
  Ptr<Linear> proj;

 private:
  Kind kind_;
};

}  // namespace ferry::nn
