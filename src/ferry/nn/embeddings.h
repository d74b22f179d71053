// Embeddings of timesteps, guidance, pooled prompts and positions (diffusers models/embeddings.py).
#pragma once

#include <utility>

#include "ferry/nn/activations.h"
#include "ferry/nn/linear.h"

namespace ferry::nn {

struct TimestepEmbeddingOptions {
  bool flip_sin_to_cos = false;
  double downscale_freq_shift = 1;
  double scale = 1;
  int64_t max_period = 10000;
};
// timesteps [n], any dtype -> [n, embedding_dim] float32.
at::Tensor get_timestep_embedding(const at::Tensor& timesteps, int64_t embedding_dim,
                                  const TimestepEmbeddingOptions& options = {});

// Sinusoids of a fixed width; has no parameters.
class Timesteps : public Module {
 public:
  Timesteps(int64_t num_channels, bool flip_sin_to_cos, double downscale_freq_shift,
            double scale = 1);
  // [n] -> [n, num_channels] float32
  at::Tensor forward(const at::Tensor& timesteps);

 private:
  int64_t num_channels_;
  TimestepEmbeddingOptions options_;
};

class TimestepEmbedding : public Module {
 public:
  TimestepEmbedding(int64_t in_channels, int64_t time_embed_dim, const std::string& act_fn = "silu",
                    std::optional<int64_t> out_dim = std::nullopt,
                    std::optional<int64_t> cond_proj_dim = std::nullopt, bool with_bias = true);
  // sample [n, in_channels], condition [n, cond_proj_dim] or undefined -> [n, out_dim]
  at::Tensor forward(const at::Tensor& sample, const at::Tensor& condition = {});

  Ptr<Linear> linear_1, cond_proj, linear_2;

 private:
  Activation act_;
};

class PixArtAlphaTextProjection : public Module {
 public:
  // act_fn: "gelu_tanh", "silu" or "silu_fp32".
  PixArtAlphaTextProjection(int64_t in_features, int64_t hidden_size,
                            const std::string& act_fn = "gelu_tanh",
                            std::optional<int64_t> out_features = std::nullopt);
  // [..., in_features] -> [..., out_features]
  at::Tensor forward(const at::Tensor& caption);

  Ptr<Linear> linear_1, linear_2;

 private:
  Activation act_;
};

// CombinedTimestepTextProjEmbeddings, and with guidance CombinedTimestepGuidanceTextProjEmbeddings.
class CombinedTimestepTextProjEmbeddings : public Module {
 public:
  CombinedTimestepTextProjEmbeddings(int64_t embedding_dim, int64_t pooled_projection_dim,
                                     bool with_guidance = false);
  // timestep [batch], guidance [batch] (undefined without it), pooled_projection
  // [batch, pooled_projection_dim] -> [batch, embedding_dim]
  at::Tensor forward(const at::Tensor& timestep, const at::Tensor& guidance,
                     const at::Tensor& pooled_projection);

  Ptr<Timesteps> time_proj;
  Ptr<TimestepEmbedding> timestep_embedder;
  Ptr<TimestepEmbedding> guidance_embedder;  // null without guidance
  Ptr<PixArtAlphaTextProjection> text_embedder;
};

// cos and sin of the rotation angles, each [tokens, dim] float32.
using RotaryEmbedding = std::pair<at::Tensor, at::Tensor>;

struct RotaryOptions {
  double theta = 10000;
  double linear_factor = 1;
  double ntk_factor = 1;
  // Each frequency twice in a row (flux, hunyuan-dit); else the frequencies, and once more behind.
  bool repeat_interleave_real = true;
  at::ScalarType freqs_dtype = at::kFloat;
};
// get_1d_rotary_pos_embed(use_real=True): pos [tokens] -> [tokens, dim] each. Throws ArgumentError
// for an odd dim.
RotaryEmbedding get_1d_rotary_pos_embed(int64_t dim, const at::Tensor& pos,
                                        const RotaryOptions& options = {});

// How channels pair up: neighbours (2i, 2i + 1), or halves (i, i + dim / 2).
enum class RotaryPairs { neighbours, halves };
// apply_rotary_emb(use_real=True): x [batch, tokens, heads, dim] for sequence_dim 1, [batch, heads,
// tokens, dim] for 2; computed in float32, returned in x's dtype.
at::Tensor apply_rotary_emb(const at::Tensor& x, const RotaryEmbedding& freqs_cis,
                            int64_t sequence_dim = 2, RotaryPairs pairs = RotaryPairs::neighbours);

// FluxPosEmbed; has no parameters.
class FluxPosEmbed : public Module {
 public:
  FluxPosEmbed(double theta, std::vector<int64_t> axes_dim);
  // ids [tokens, axes] -> [tokens, sum of axes_dim] each
  RotaryEmbedding forward(const at::Tensor& ids);

 private:
  double theta_;
  std::vector<int64_t> axes_dim_;
};

}  // namespace ferry::nn
