// The adaptive normalizations of diffusers (models/normalization.py): a conditioning vector is
// projected to shifts, scales and gates.
#pragma once

#include "ferry/nn/linear.h"
#include "ferry/nn/norms.h"

namespace ferry::nn {

// AdaLayerNormZero without a class embedding (num_embeddings=None).
class AdaLayerNormZero : public Module {
 public:
  explicit AdaLayerNormZero(int64_t embedding_dim, bool with_bias = true);

  struct Output {
    at::Tensor x;                                         // [batch, tokens, dim]
    at::Tensor gate_msa, shift_mlp, scale_mlp, gate_mlp;  // [batch, dim]
    std::vector<at::Tensor> tensors() const {
      return {x, gate_msa, shift_mlp, scale_mlp, gate_mlp};
    }
    template <class F>
    void each_tensor(F&& f) {
      nn::each_tensor(x, f);
      nn::each_tensor(gate_msa, f);
      nn::each_tensor(shift_mlp, f);
      nn::each_tensor(scale_mlp, f);
      nn::each_tensor(gate_mlp, f);
    }
  };
  // x [batch, tokens, dim], emb [batch, dim]
  Output forward(const at::Tensor& x, const at::Tensor& emb);

  Ptr<Linear> linear;
  Ptr<LayerNorm> norm;
};

class AdaLayerNormZeroSingle : public Module {
 public:
  explicit AdaLayerNormZeroSingle(int64_t embedding_dim, bool with_bias = true);

  struct Output {
    at::Tensor x;         // [batch, tokens, dim]
    at::Tensor gate_msa;  // [batch, dim]
    std::vector<at::Tensor> tensors() const { return {x, gate_msa}; }
    template <class F>
    void each_tensor(F&& f) {
      nn::each_tensor(x, f);
      nn::each_tensor(gate_msa, f);
    }
  };
  // x [batch, tokens, dim], emb [batch, dim]
  Output forward(const at::Tensor& x, const at::Tensor& emb);

  Ptr<Linear> linear;
  Ptr<LayerNorm> norm;
};

class AdaLayerNormContinuous : public Module {
 public:
  // norm_type: "layer_norm", or "rms_norm" (diffusers' own). Throws ArgumentError for others.
  AdaLayerNormContinuous(int64_t embedding_dim, int64_t conditioning_embedding_dim,
                         bool elementwise_affine = true, double eps = 1e-5, bool with_bias = true,
                         const std::string& norm_type = "layer_norm");
  // x [batch, tokens, dim], conditioning_embedding [batch, conditioning_embedding_dim]
  at::Tensor forward(const at::Tensor& x, const at::Tensor& conditioning_embedding);

  Ptr<Linear> linear;
  Ptr<LayerNorm> layer_norm;  // one of the two, under the name "norm"
  Ptr<DiffusersRMSNorm> rms_norm;
};

// x * (1 + scale) + shift with scale, shift [batch, dim] over x [batch, tokens, dim].
at::Tensor modulate(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift);

// product + other; reuses the memory of `product`, a temporary of the caller, where dtypes allow.
at::Tensor add_to_product(at::Tensor product, const at::Tensor& other);

}  // namespace ferry::nn
