// AutoencoderKL (diffusers models/autoencoders/autoencoder_kl.py and vae.py).
#pragma once

#include "ferry/models/autoencoders/autoencoder.h"
#include "ferry/models/autoencoders/vae_blocks.h"
#include "ferry/models/config.h"
#include "ferry/models/model.h"
#include "ferry/tensor/generator.h"

namespace ferry::models {

struct AutoencoderKLConfig : ConfigBase {
  int64_t in_channels = 3;
  int64_t out_channels = 3;
  std::vector<std::string> down_block_types = {"DownEncoderBlock2D"};
  std::vector<std::string> up_block_types = {"UpDecoderBlock2D"};
  std::vector<int64_t> block_out_channels = {64};
  int64_t layers_per_block = 1;
  std::string act_fn = "silu";
  int64_t latent_channels = 4;
  int64_t norm_num_groups = 32;
  // A number, or a list of two of which the first counts.
  nlohmann::ordered_json sample_size = 32;
  double scaling_factor = 0.18215;
  std::optional<double> shift_factor;
  std::optional<std::vector<double>> latents_mean;
  std::optional<std::vector<double>> latents_std;
  bool force_upcast = true;
  bool use_quant_conv = true;
  bool use_post_quant_conv = true;
  bool mid_block_add_attention = true;

  template <class V>
  void fields(V& v) {
    v("in_channels", in_channels);
    v("out_channels", out_channels);
    v("down_block_types", down_block_types);
    v("up_block_types", up_block_types);
    v("block_out_channels", block_out_channels);
    v("layers_per_block", layers_per_block);
    v("act_fn", act_fn);
    v("latent_channels", latent_channels);
    v("norm_num_groups", norm_num_groups);
    v("sample_size", sample_size);
    v("scaling_factor", scaling_factor);
    v("shift_factor", shift_factor);
    v("latents_mean", latents_mean);
    v("latents_std", latents_std);
    v("force_upcast", force_upcast);
    v("use_quant_conv", use_quant_conv);
    v("use_post_quant_conv", use_post_quant_conv);
    v("mid_block_add_attention", mid_block_add_attention);
  }
};

// A normal distribution for each latent value (diffusers' DiagonalGaussianDistribution).
class DiagonalGaussianDistribution {
 public:
  // parameters [batch, 2 * latent_channels, height, width]: means, then logarithms of variances.
  explicit DiagonalGaussianDistribution(at::Tensor parameters);

  const at::Tensor& mean() const { return mean_; }      // [batch, latent_channels, height, width]
  const at::Tensor& logvar() const { return logvar_; }  // clamped to -30..20
  at::Tensor std() const;
  at::Tensor var() const;
  // One generator for the batch, or one for each of its samples; none uses torch's default.
  at::Tensor sample(const std::vector<tensor::Generator>& generators = {}) const;
  const at::Tensor& mode() const { return mean_; }

  std::vector<at::Tensor> tensors() const { return {parameters_}; }

 private:
  at::Tensor parameters_, mean_, logvar_;
};

class Encoder : public nn::Module {
 public:
  explicit Encoder(const AutoencoderKLConfig& config);
  // [batch, in_channels, height, width] -> [batch, 2 * latent_channels, height / f, width / f]
  at::Tensor forward(const at::Tensor& sample);

  nn::Ptr<nn::Conv2d> conv_in;
  nn::Ptr<nn::ModuleList<DownEncoderBlock2D>> down_blocks;
  nn::Ptr<UNetMidBlock2D> mid_block;
  nn::Ptr<nn::GroupNorm> conv_norm_out;
  nn::Ptr<nn::Conv2d> conv_out;
};

class Decoder : public nn::Module {
 public:
  explicit Decoder(const AutoencoderKLConfig& config);
  // [batch, latent_channels, height, width] -> [batch, out_channels, f * height, f * width]
  at::Tensor forward(const at::Tensor& sample);

  nn::Ptr<nn::Conv2d> conv_in;
  nn::Ptr<nn::ModuleList<UpDecoderBlock2D>> up_blocks;
  nn::Ptr<UNetMidBlock2D> mid_block;
  nn::Ptr<nn::GroupNorm> conv_norm_out;
  nn::Ptr<nn::Conv2d> conv_out;
};

// Thread-safety: as Model.
class AutoencoderKL : public Model, public AutoencoderMixin {
 public:
  using Config = AutoencoderKLConfig;

  // Throws ArgumentError for block types that are not supported and sizes that do not fit.
  explicit AutoencoderKL(Config config);

  // Both are call points. Latents are the model's own: no scaling_factor, no shift_factor.
  // x [batch, in_channels, height, width], values in -1..1
  DiagonalGaussianDistribution encode(const at::Tensor& x);
  // z [batch, latent_channels, height, width] -> [batch, out_channels, f * height, f * width]
  at::Tensor decode(const at::Tensor& z);
  // Encodes and decodes, from the mode of the distribution.
  at::Tensor forward(const at::Tensor& sample);

  void enable_tiling(const TilingOptions& options = {}) override;
  int64_t tile_sample_min_size() const { return tile_sample_min_size_; }
  int64_t tile_latent_min_size() const { return tile_latent_min_size_; }

  std::string class_name() const override { return "AutoencoderKL"; }
  nlohmann::ordered_json config_json() const override { return config_to_json(config_); }
  Traits traits() const override;
  std::vector<std::string> methods() const override { return {"forward", "encode", "decode"}; }
  NamedTensors forward_named(const std::string& method, const NamedTensors& inputs,
                             const nlohmann::json& arguments) override;
  std::vector<std::string> unused_modules(const std::string& method,
                                          const nlohmann::json& arguments) const override;
  Costs costs(const Workload& workload) const override;
  // Knows the names that attention layers had in old checkpoints (query, proj_attn).
  std::string map_key(const std::string& checkpoint_key) const override;

  const Config& config() const { return config_; }
  int64_t scale_factor() const override {
    return int64_t{1} << (config_.block_out_channels.size() - 1);
  }

  nn::Ptr<Encoder> encoder;
  nn::Ptr<Decoder> decoder;
  nn::Ptr<nn::Conv2d> quant_conv, post_quant_conv;  // may be null

 private:
  at::Tensor encode_tile(const at::Tensor& x);
  at::Tensor decode_tile(const at::Tensor& z);
  at::Tensor encode_moments(const at::Tensor& x);
  at::Tensor decode_sample(const at::Tensor& z);
  // Slices and tiles as they are set; `from` and `into` are a tile's side before and after `run`.
  at::Tensor run_in_parts(const at::Tensor& x, int64_t from, int64_t into,
                          const std::function<at::Tensor(const at::Tensor&)>& run);

  Config config_;
  int64_t tile_sample_min_size_;
  int64_t tile_latent_min_size_;
  double tile_overlap_factor_ = 0.25;
};

}  // namespace ferry::models
