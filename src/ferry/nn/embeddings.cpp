#include "ferry/nn/embeddings.h"

#include <ATen/ATen.h>

#include <cmath>

#include "ferry/base/error.h"
#include "ferry/nn/rotary_kernel.h"

namespace ferry::nn {

at::Tensor get_timestep_embedding(const at::Tensor& timesteps, int64_t embedding_dim,
                                  const TimestepEmbeddingOptions& options) {
  if (timesteps.dim() != 1) {
    throw_error<ArgumentError>("get_timestep_embedding: timesteps have {} dimensions, expected 1",
                               timesteps.dim());
  }
  int64_t half_dim = embedding_dim / 2;
  at::Tensor exponent = at::arange(0, half_dim, timesteps.options().dtype(at::kFloat)) *
                        -std::log(static_cast<double>(options.max_period));
  exponent = exponent / (static_cast<double>(half_dim) - options.downscale_freq_shift);
  at::Tensor emb = timesteps.unsqueeze(1).to(at::kFloat) * at::exp(exponent).unsqueeze(0);
  if (options.scale != 1) emb = emb * options.scale;
  emb = options.flip_sin_to_cos ? at::cat({at::cos(emb), at::sin(emb)}, -1)
                                : at::cat({at::sin(emb), at::cos(emb)}, -1);
  if (embedding_dim % 2 == 1) emb = at::constant_pad_nd(emb, {0, 1, 0, 0});
  return emb;
}

Timesteps::Timesteps(int64_t num_channels, bool flip_sin_to_cos, double downscale_freq_shift,
                     double scale)
    : num_channels_(num_channels),
      options_{.flip_sin_to_cos = flip_sin_to_cos,
               .downscale_freq_shift = downscale_freq_shift,
               .scale = scale} {}

at::Tensor Timesteps::forward(const at::Tensor& timesteps) {
  return get_timestep_embedding(timesteps, num_channels_, options_);
}

TimestepEmbedding::TimestepEmbedding(int64_t in_channels, int64_t time_embed_dim,
                                     const std::string& act_fn, std::optional<int64_t> out_dim,
                                     std::optional<int64_t> cond_proj_dim, bool with_bias)
    : act_(get_activation(act_fn)) {
  linear_1 = register_module("linear_1", make<Linear>(in_channels, time_embed_dim, with_bias));
  if (cond_proj_dim) {
    cond_proj = register_module("cond_proj", make<Linear>(*cond_proj_dim, in_channels, false));
  }
  linear_2 = register_module(
      "linear_2", make<Linear>(time_embed_dim, out_dim.value_or(time_embed_dim), with_bias));
}

at::Tensor TimestepEmbedding::forward(const at::Tensor& sample, const at::Tensor& condition) {
  at::Tensor x = condition.defined() ? sample + cond_proj(condition) : sample;
  return linear_2(act_(linear_1(x)));
}

PixArtAlphaTextProjection::PixArtAlphaTextProjection(int64_t in_features, int64_t hidden_size,
                                                     const std::string& act_fn,
                                                     std::optional<int64_t> out_features)
    : act_(get_activation(act_fn)) {
  linear_1 = register_module("linear_1", make<Linear>(in_features, hidden_size));
  linear_2 =
      register_module("linear_2", make<Linear>(hidden_size, out_features.value_or(hidden_size)));
}

at::Tensor PixArtAlphaTextProjection::forward(const at::Tensor& caption) {
  return linear_2(act_(linear_1(caption)));
}

CombinedTimestepTextProjEmbeddings::CombinedTimestepTextProjEmbeddings(
    int64_t embedding_dim, int64_t pooled_projection_dim, bool with_guidance) {
  time_proj = register_module("time_proj", make<Timesteps>(256, /*flip_sin_to_cos=*/true, 0));
  timestep_embedder =
      register_module("timestep_embedder", make<TimestepEmbedding>(256, embedding_dim));
  if (with_guidance) {
    guidance_embedder =
        register_module("guidance_embedder", make<TimestepEmbedding>(256, embedding_dim));
  }
  text_embedder = register_module(
      "text_embedder",
      make<PixArtAlphaTextProjection>(pooled_projection_dim, embedding_dim, "silu"));
}

at::Tensor CombinedTimestepTextProjEmbeddings::forward(const at::Tensor& timestep,
                                                       const at::Tensor& guidance,
                                                       const at::Tensor& pooled_projection) {
  at::ScalarType dtype = pooled_projection.scalar_type();
  at::Tensor emb = timestep_embedder(time_proj(timestep).to(dtype));  // [batch, dim]
  if (guidance.defined()) emb = emb + guidance_embedder(time_proj(guidance).to(dtype));
  return emb + text_embedder(pooled_projection);
}

RotaryEmbedding get_1d_rotary_pos_embed(int64_t dim, const at::Tensor& pos,
                                        const RotaryOptions& options) {
  if (dim % 2 != 0) {
    throw_error<ArgumentError>("get_1d_rotary_pos_embed: got dimension {}, expected an even one",
                               dim);
  }
  at::Tensor exponents =
      at::arange(0, dim, 2, pos.options().dtype(options.freqs_dtype)) / static_cast<double>(dim);
  at::Tensor freqs = at::reciprocal(at::pow(options.theta * options.ntk_factor, exponents));
  if (options.linear_factor != 1) freqs = freqs / options.linear_factor;
  freqs = at::outer(pos, freqs);  // [tokens, dim / 2]
  auto spread = [&](const at::Tensor& half) {
    at::Tensor full = options.repeat_interleave_real
                          ? half.unsqueeze(-1).expand({-1, -1, 2}).flatten(1)
                          : at::cat({half, half}, -1);
    return full.to(at::kFloat);
  };
  return {spread(freqs.cos()), spread(freqs.sin())};
}

at::Tensor apply_rotary_emb(const at::Tensor& x, const RotaryEmbedding& freqs_cis,
                            int64_t sequence_dim, RotaryPairs pairs) {
  if (x.dim() != 4 || (sequence_dim != 1 && sequence_dim != 2)) {
    throw_error<ArgumentError>(
        "apply_rotary_emb: got {} dimensions and sequence_dim {}, expected 4 and 1 or 2", x.dim(),
        sequence_dim);
  }
  const auto& [cos_table, sin_table] = freqs_cis;
  bool plain = x.is_cpu() && cos_table.is_cpu() && x.stride(3) == 1 && x.size(3) % 2 == 0 &&
               x.scalar_type() != at::kDouble && at::isFloatingType(x.scalar_type()) &&
               cos_table.scalar_type() == at::kFloat && cos_table.is_contiguous() &&
               sin_table.is_contiguous() && cos_table.size(0) == x.size(sequence_dim) &&
               cos_table.size(1) == x.size(3) && sin_table.sizes() == cos_table.sizes();
  if (plain && !(at::GradMode::is_enabled() && x.requires_grad())) {
    return rotate_on_cpu(x, cos_table, sin_table, sequence_dim, pairs == RotaryPairs::neighbours);
  }
  // [1, 1, tokens, dim] or [1, tokens, 1, dim]
  int64_t head_dim = sequence_dim == 2 ? 0 : 1;
  at::Tensor cos = freqs_cis.first.to(x.device()).unsqueeze(head_dim).unsqueeze(0);
  at::Tensor sin = freqs_cis.second.to(x.device()).unsqueeze(head_dim).unsqueeze(0);
  at::Tensor wide = x.to(at::kFloat);
  at::Tensor rotated;
  if (pairs == RotaryPairs::neighbours) {
    auto parts = wide.unflatten(-1, {-1, 2}).unbind(-1);  // [..., dim / 2] each
    rotated = at::stack({-parts[1], parts[0]}, -1).flatten(3);
  } else {
    auto parts = wide.chunk(2, -1);
    rotated = at::cat({-parts[1], parts[0]}, -1);
  }
  return (wide * cos).add_(rotated * sin).to(x.scalar_type());
}

FluxPosEmbed::FluxPosEmbed(double theta, std::vector<int64_t> axes_dim)
    : theta_(theta), axes_dim_(std::move(axes_dim)) {}

RotaryEmbedding FluxPosEmbed::forward(const at::Tensor& ids) {
  if (ids.dim() != 2 || ids.size(1) != static_cast<int64_t>(axes_dim_.size())) {
    throw_error<ArgumentError>("FluxPosEmbed: ids of {} dimensions, expected [tokens, {}]",
                               ids.dim(), axes_dim_.size());
  }
  at::Tensor pos = ids.to(at::kFloat);
  // As the reference: double precision where the device has it.
  RotaryOptions options{.theta = theta_,
                        .freqs_dtype = ids.device().is_mps() ? at::kFloat : at::kDouble};
  std::vector<at::Tensor> cos, sin;
  for (size_t axis = 0; axis < axes_dim_.size(); ++axis) {
    auto [axis_cos, axis_sin] = get_1d_rotary_pos_embed(
        axes_dim_[axis], pos.select(1, static_cast<int64_t>(axis)), options);
    cos.push_back(std::move(axis_cos));
    sin.push_back(std::move(axis_sin));
  }
  return {at::cat(cos, -1), at::cat(sin, -1)};
}

}  // namespace ferry::nn
