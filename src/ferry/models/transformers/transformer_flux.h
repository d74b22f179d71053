// FluxTransformer2DModel (diffusers models/transformers/transformer_flux.py).
#pragma once

#include "ferry/models/config.h"
#include "ferry/models/model.h"
#include "ferry/nn/attention_dispatch.h"
#include "ferry/nn/embeddings.h"
#include "ferry/nn/feed_forward.h"
#include "ferry/nn/normalization.h"

namespace ferry::models {

struct FluxTransformer2DConfig : ConfigBase {
  int64_t patch_size = 1;
  int64_t in_channels = 64;
  std::optional<int64_t> out_channels;
  int64_t num_layers = 19;
  int64_t num_single_layers = 38;
  int64_t attention_head_dim = 128;
  int64_t num_attention_heads = 24;
  int64_t joint_attention_dim = 4096;
  int64_t pooled_projection_dim = 768;
  bool guidance_embeds = false;
  std::vector<int64_t> axes_dims_rope = {16, 56, 56};

  int64_t inner_dim() const { return num_attention_heads * attention_head_dim; }

  template <class V>
  void fields(V& v) {
    v("patch_size", patch_size);
    v("in_channels", in_channels);
    v("out_channels", out_channels);
    v("num_layers", num_layers);
    v("num_single_layers", num_single_layers);
    v("attention_head_dim", attention_head_dim);
    v("num_attention_heads", num_attention_heads);
    v("joint_attention_dim", joint_attention_dim);
    v("pooled_projection_dim", pooled_projection_dim);
    v("guidance_embeds", guidance_embeds);
    v("axes_dims_rope", axes_dims_rope);
  }
};

class FluxAttention;

struct FluxAttentionOutput {
  at::Tensor hidden_states;          // [batch, tokens, dim]
  at::Tensor encoder_hidden_states;  // [batch, text tokens, dim]; undefined in single blocks
  std::vector<at::Tensor> tensors() const { return {hidden_states, encoder_hidden_states}; }
  template <class F>
  void each_tensor(F&& f) {
    nn::each_tensor(hidden_states, f);
    nn::each_tensor(encoder_hidden_states, f);
  }
};

// What an attention module computes between its layers; stateless, shared between modules.
class FluxAttnProcessor {
 public:
  virtual ~FluxAttnProcessor() = default;
  virtual std::string name() const { return "FluxAttnProcessor"; }
  // hidden_states [batch, tokens, dim]; encoder_hidden_states [batch, text tokens, dim] or
  // undefined.
  virtual FluxAttentionOutput run(FluxAttention& attn, const at::Tensor& hidden_states,
                                  const at::Tensor& encoder_hidden_states,
                                  const at::Tensor& attention_mask,
                                  const nn::RotaryEmbedding* image_rotary_emb) const;
};

struct FluxAttentionOptions {
  int64_t heads = 8;
  int64_t dim_head = 64;
  double eps = 1e-5;
  // Projections for the text tokens, and an output projection for both: in the double blocks.
  bool joint = false;
};

class FluxAttention : public nn::AttentionModule {
 public:
  FluxAttention(int64_t dim, const FluxAttentionOptions& options);

  FluxAttentionOutput forward(const at::Tensor& hidden_states,
                              const at::Tensor& encoder_hidden_states,
                              const at::Tensor& attention_mask,
                              const nn::RotaryEmbedding* image_rotary_emb);

  std::vector<std::string> available_processors() const override { return {"FluxAttnProcessor"}; }
  std::string processor_name() const override { return processor_->name(); }
  void set_processor(const std::string& name) override;
  void set_processor(std::shared_ptr<const FluxAttnProcessor> processor);
  void fuse_projections() override;
  void unfuse_projections() override;

  int64_t head_dim() const { return head_dim_; }

  nn::Ptr<nn::RMSNorm> norm_q, norm_k;
  nn::Ptr<nn::Linear> to_q, to_k, to_v;
  nn::Ptr<nn::Linear> to_qkv;  // only while fused
  // Null in single blocks.
  nn::Ptr<nn::Container> to_out;
  nn::Ptr<nn::Linear> to_out_0;
  nn::Ptr<nn::RMSNorm> norm_added_q, norm_added_k;
  nn::Ptr<nn::Linear> add_q_proj, add_k_proj, add_v_proj;
  nn::Ptr<nn::Linear> to_added_qkv;  // only while fused
  nn::Ptr<nn::Linear> to_add_out;

 private:
  int64_t head_dim_;
  std::shared_ptr<const FluxAttnProcessor> processor_;
};

// Both streams, text first.
struct FluxStreams {
  at::Tensor encoder_hidden_states;  // [batch, text tokens, dim]
  at::Tensor hidden_states;          // [batch, image tokens, dim]
  std::vector<at::Tensor> tensors() const { return {encoder_hidden_states, hidden_states}; }
  template <class F>
  void each_tensor(F&& f) {
    nn::each_tensor(encoder_hidden_states, f);
    nn::each_tensor(hidden_states, f);
  }
};

class FluxTransformerBlock : public nn::Module {
 public:
  explicit FluxTransformerBlock(const FluxTransformer2DConfig& config);
  // temb [batch, dim]
  FluxStreams forward(const at::Tensor& hidden_states, const at::Tensor& encoder_hidden_states,
                      const at::Tensor& temb, const nn::RotaryEmbedding& image_rotary_emb);

  nn::Ptr<nn::AdaLayerNormZero> norm1, norm1_context;
  nn::Ptr<FluxAttention> attn;
  nn::Ptr<nn::LayerNorm> norm2, norm2_context;
  nn::Ptr<nn::FeedForward> ff, ff_context;
};

class FluxSingleTransformerBlock : public nn::Module {
 public:
  explicit FluxSingleTransformerBlock(const FluxTransformer2DConfig& config);
  FluxStreams forward(const at::Tensor& hidden_states, const at::Tensor& encoder_hidden_states,
                      const at::Tensor& temb, const nn::RotaryEmbedding& image_rotary_emb);

  nn::Ptr<nn::AdaLayerNormZeroSingle> norm;
  nn::Ptr<nn::Linear> proj_mlp, proj_out;
  nn::Ptr<FluxAttention> attn;
};

// What a ControlNet adds after the blocks; block i takes the residual at its share of the list.
struct FluxControlnetResiduals {
  std::vector<at::Tensor> block_samples;  // [batch, image tokens, dim] each
  std::vector<at::Tensor> single_block_samples;
  // Go through block_samples again and again instead of stretching them.
  bool blocks_repeat = false;
};

// Thread-safety: as Model.
class FluxTransformer2DModel : public Model {
 public:
  using Config = FluxTransformer2DConfig;

  // Throws ArgumentError for sizes that do not fit each other.
  explicit FluxTransformer2DModel(Config config);

  // hidden_states [batch, image tokens, in_channels], encoder_hidden_states [batch, text tokens,
  // joint_attention_dim], pooled_projections [batch, pooled_projection_dim], timestep [batch] in
  // 0..1, img_ids [image tokens, axes], txt_ids [text tokens, axes], guidance [batch], needed
  // exactly with guidance_embeds -> [batch, image tokens, patch_size^2 * out_channels].
  // Throws ArgumentError for guidance that is missing or not wanted.
  at::Tensor forward(const at::Tensor& hidden_states, const at::Tensor& encoder_hidden_states,
                     const at::Tensor& pooled_projections, const at::Tensor& timestep,
                     const at::Tensor& img_ids, const at::Tensor& txt_ids,
                     const at::Tensor& guidance = {},
                     const FluxControlnetResiduals& controlnet = {});

  std::string class_name() const override { return "FluxTransformer2DModel"; }
  nlohmann::ordered_json config_json() const override { return config_to_json(config_); }
  Traits traits() const override;
  NamedTensors forward_named(const std::string& method, const NamedTensors& inputs,
                             const nlohmann::json& arguments) override;
  Costs costs(const Workload& workload) const override;

  const Config& config() const { return config_; }

  nn::Ptr<nn::FluxPosEmbed> pos_embed;
  nn::Ptr<nn::CombinedTimestepTextProjEmbeddings> time_text_embed;
  nn::Ptr<nn::Linear> context_embedder, x_embedder;
  nn::Ptr<nn::ModuleList<FluxTransformerBlock>> transformer_blocks;
  nn::Ptr<nn::ModuleList<FluxSingleTransformerBlock>> single_transformer_blocks;
  nn::Ptr<nn::AdaLayerNormContinuous> norm_out;
  nn::Ptr<nn::Linear> proj_out;

 private:
  Config config_;
};

}  // namespace ferry::models
