// CLIP's text encoder: CLIPTextModel and CLIPTextModelWithProjection of transformers 5.23
// (models/clip/modeling_clip.py).
#pragma once

#include "ferry/models/config.h"
#include "ferry/models/text_encoders/transformers_model.h"
#include "ferry/nn/activations.h"
#include "ferry/nn/attention_dispatch.h"
#include "ferry/nn/embedding.h"
#include "ferry/nn/linear.h"
#include "ferry/nn/norms.h"

namespace ferry::models {

struct CLIPTextConfig : ConfigBase {
  int64_t vocab_size = 49408;
  int64_t hidden_size = 512;
  int64_t intermediate_size = 2048;
  std::optional<int64_t> projection_dim = 512;
  int64_t num_hidden_layers = 12;
  int64_t num_attention_heads = 8;
  int64_t max_position_embeddings = 77;
  std::string hidden_act = "quick_gelu";
  std::optional<double> layer_norm_eps = 1e-5;
  std::optional<double> attention_dropout = 0.0;
  double initializer_range = 0.02;
  std::optional<double> initializer_factor = 1.0;
  std::optional<int64_t> pad_token_id = 1;
  std::optional<int64_t> bos_token_id = 49406;
  // Where the pooled output is taken: the first token of this id; with 2, which older files carry
  // by mistake, the token with the highest id.
  std::optional<int64_t> eos_token_id = 49407;

  template <class V>
  void fields(V& v) {
    v("vocab_size", vocab_size);
    v("hidden_size", hidden_size);
    v("intermediate_size", intermediate_size);
    v("projection_dim", projection_dim);
    v("num_hidden_layers", num_hidden_layers);
    v("num_attention_heads", num_attention_heads);
    v("max_position_embeddings", max_position_embeddings);
    v("hidden_act", hidden_act);
    v("layer_norm_eps", layer_norm_eps);
    v("attention_dropout", attention_dropout);
    v("initializer_range", initializer_range);
    v("initializer_factor", initializer_factor);
    v("pad_token_id", pad_token_id);
    v("bos_token_id", bos_token_id);
    v("eos_token_id", eos_token_id);
  }
};

class CLIPTextEmbeddings : public nn::Module {
 public:
  explicit CLIPTextEmbeddings(const CLIPTextConfig& config);
  // input_ids [batch, tokens], position_ids [1 or batch, tokens] or undefined -> [batch, tokens,
  // channels]. Throws ArgumentError for more tokens than max_position_embeddings.
  at::Tensor forward(const at::Tensor& input_ids, const at::Tensor& position_ids);

  nn::Ptr<nn::Embedding> token_embedding, position_embedding;

 private:
  int64_t max_positions_;
};

// Its processor is transformers' "sdpa" attention.
class CLIPAttention : public nn::AttentionModule {
 public:
  explicit CLIPAttention(const CLIPTextConfig& config);
  // hidden_states [batch, tokens, channels]; mask: bool, with the causal part in it, or undefined:
  // then plainly causal.
  at::Tensor forward(const at::Tensor& hidden_states, const at::Tensor& mask);
  std::vector<std::string> available_processors() const override { return {"sdpa"}; }
  std::string processor_name() const override { return "sdpa"; }
  void set_processor(const std::string& name) override;

  nn::Ptr<nn::Linear> k_proj, v_proj, q_proj, out_proj;

 private:
  int64_t num_heads_;
};

class CLIPMLP : public nn::Module {
 public:
  explicit CLIPMLP(const CLIPTextConfig& config);
  at::Tensor forward(const at::Tensor& hidden_states);

  nn::Ptr<nn::Linear> fc1, fc2;

 private:
  nn::Activation activation_;
};

class CLIPEncoderLayer : public nn::Module {
 public:
  explicit CLIPEncoderLayer(const CLIPTextConfig& config);
  at::Tensor forward(const at::Tensor& hidden_states, const at::Tensor& mask);

  nn::Ptr<CLIPAttention> self_attn;
  nn::Ptr<nn::LayerNorm> layer_norm1, layer_norm2;
  nn::Ptr<CLIPMLP> mlp;
};

class CLIPEncoder : public nn::Module {
 public:
  explicit CLIPEncoder(const CLIPTextConfig& config);
  // Through the first `num_layers` layers. The states before the first one and after each are
  // offered to `tap`.
  at::Tensor forward(const at::Tensor& inputs_embeds, const at::Tensor& mask, int64_t num_layers,
                     HiddenStateTap* tap);

  nn::Ptr<nn::ModuleList<CLIPEncoderLayer>> layers;
};

struct CLIPTextOutput {          // what is not wanted is undefined
  at::Tensor last_hidden_state;  // [batch, tokens, channels], after final_layer_norm
  at::Tensor pooler_output;      // [batch, channels]
  // Those that are wanted, each before final_layer_norm; all are the embeddings and each layer's.
  std::vector<at::Tensor> hidden_states;
  std::vector<at::Tensor> tensors() const { return {last_hidden_state, pooler_output}; }
  template <class F>
  void each_tensor(F&& f) {
    nn::each_tensor(last_hidden_state, f);
    nn::each_tensor(pooler_output, f);
    nn::each_tensor(hidden_states, f);
  }
};

class CLIPTextModel : public TransformersModel {
 public:
  using Config = CLIPTextConfig;
  // Throws ArgumentError for a config that cannot work.
  explicit CLIPTextModel(CLIPTextConfig config);
  std::string class_name() const override { return "CLIPTextModel"; }
  nlohmann::ordered_json config_json() const override;
  Traits traits() const override;
  // Inputs: input_ids, attention_mask, position_ids; arguments output_hidden_states, outputs (names
  // of those that are wanted). Outputs: last_hidden_state, pooler_output, hidden_states.N.
  NamedTensors forward_named(const std::string& method, const NamedTensors& inputs,
                             const nlohmann::json& arguments) override;
  // Before transformers 5, and in whole CLIP checkpoints, the keys begin with "text_model.".
  std::string map_key(const std::string& checkpoint_key) const override;

  // input_ids [batch, tokens]; attention_mask [batch, tokens] and position_ids may be undefined.
  CLIPTextOutput forward(const at::Tensor& input_ids, const at::Tensor& attention_mask = {},
                         const at::Tensor& position_ids = {}, const TextOutputs& wanted = {});
  std::vector<std::string> unused_modules(const std::string& method,
                                          const nlohmann::json& arguments) const override;
  std::vector<std::string> unused_modules(const TextOutputs& wanted) const;
  Costs costs(const Workload& workload) const override;

  const CLIPTextConfig& config() const { return config_; }

  nn::Ptr<CLIPTextEmbeddings> embeddings;
  nn::Ptr<CLIPEncoder> encoder;
  nn::Ptr<nn::LayerNorm> final_layer_norm;

 protected:
  std::vector<std::string> output_names() const override {
    return {"last_hidden_state", "pooler_output"};
  }

 private:
  // Layers to run for what is wanted.
  int64_t layers_for(const TextOutputs& wanted, const HiddenStateTap& tap) const;

  CLIPTextConfig config_;
};

class CLIPTextModelWithProjection : public TransformersModel {
 public:
  using Config = CLIPTextConfig;
  explicit CLIPTextModelWithProjection(CLIPTextConfig config);
  std::string class_name() const override { return "CLIPTextModelWithProjection"; }
  nlohmann::ordered_json config_json() const override;
  Traits traits() const override;
  // As CLIPTextModel's, with text_embeds in place of pooler_output.
  NamedTensors forward_named(const std::string& method, const NamedTensors& inputs,
                             const nlohmann::json& arguments) override;
  std::string map_key(const std::string& checkpoint_key) const override;

  struct Output {
    at::Tensor text_embeds;  // [batch, projection_dim]; undefined if pooled is not wanted
    CLIPTextOutput text;
    std::vector<at::Tensor> tensors() const { return {text_embeds, text.last_hidden_state}; }
    template <class F>
    void each_tensor(F&& f) {
      nn::each_tensor(text_embeds, f);
      nn::each_tensor(text, f);
    }
  };
  Output forward(const at::Tensor& input_ids, const at::Tensor& attention_mask = {},
                 const at::Tensor& position_ids = {}, const TextOutputs& wanted = {});
  std::vector<std::string> unused_modules(const std::string& method,
                                          const nlohmann::json& arguments) const override;
  Costs costs(const Workload& workload) const override;

  const CLIPTextConfig& config() const { return text_model->config(); }

  nn::Ptr<CLIPTextModel> text_model;
  nn::Ptr<nn::Linear> text_projection;

 protected:
  std::vector<std::string> output_names() const override {
    return {"last_hidden_state", "text_embeds"};
  }
};

}  // namespace ferry::models
