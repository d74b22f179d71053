// T5's encoder: T5EncoderModel of transformers 5.23 (models/t5/modeling_t5.py).
#pragma once

#include "ferry/models/config.h"
#include "ferry/models/text_encoders/transformers_model.h"
#include "ferry/nn/activations.h"
#include "ferry/nn/attention_dispatch.h"
#include "ferry/nn/embedding.h"
#include "ferry/nn/linear.h"
#include "ferry/nn/norms.h"

namespace ferry::models {

struct T5Config : ConfigBase {
  int64_t vocab_size = 32128;
  int64_t d_model = 512;
  int64_t d_kv = 64;
  int64_t d_ff = 2048;
  int64_t num_layers = 6;
  std::optional<int64_t> num_decoder_layers;  // unset: num_layers
  int64_t num_heads = 8;
  int64_t relative_attention_num_buckets = 32;
  int64_t relative_attention_max_distance = 128;
  double dropout_rate = 0.1;
  double layer_norm_epsilon = 1e-6;
  double initializer_factor = 1.0;
  // "relu", "gated-gelu" (which means gelu_new), or "[gated-]" and another activation.
  std::string feed_forward_proj = "relu";
  bool is_encoder_decoder = false;
  bool use_cache = false;
  std::optional<int64_t> pad_token_id = 0;
  nlohmann::ordered_json eos_token_id = 1;  // a number, a list or null
  double classifier_dropout = 0.0;
  bool is_decoder = false;

  template <class V>
  void fields(V& v) {
    v("vocab_size", vocab_size);
    v("d_model", d_model);
    v("d_kv", d_kv);
    v("d_ff", d_ff);
    v("num_layers", num_layers);
    v("num_decoder_layers", num_decoder_layers);
    v("num_heads", num_heads);
    v("relative_attention_num_buckets", relative_attention_num_buckets);
    v("relative_attention_max_distance", relative_attention_max_distance);
    v("dropout_rate", dropout_rate);
    v("layer_norm_epsilon", layer_norm_epsilon);
    v("initializer_factor", initializer_factor);
    v("feed_forward_proj", feed_forward_proj);
    v("is_encoder_decoder", is_encoder_decoder);
    v("use_cache", use_cache);
    v("pad_token_id", pad_token_id);
    v("eos_token_id", eos_token_id);
    v("classifier_dropout", classifier_dropout);
    v("is_decoder", is_decoder);
  }

  bool is_gated_act() const { return feed_forward_proj.starts_with("gated-"); }
  // The name of the activation function.
  std::string dense_act_fn() const;
};

// T5LayerNorm: the root mean square in float32, no mean, no bias.
using T5LayerNorm = nn::DiffusersRMSNorm;

// T5DenseActDense and T5DenseGatedActDense.
class T5DenseActDense : public nn::Module {
 public:
  explicit T5DenseActDense(const T5Config& config);
  // [batch, tokens, channels]; the result has the dtype of `wo`, which may be float32 among halves.
  at::Tensor forward(const at::Tensor& hidden_states);

  nn::Ptr<nn::Linear> wi;          // not gated
  nn::Ptr<nn::Linear> wi_0, wi_1;  // gated: activation, factor
  nn::Ptr<nn::Linear> wo;

 private:
  nn::Activation activation_;
};

class T5LayerFF : public nn::Module {
 public:
  explicit T5LayerFF(const T5Config& config);
  at::Tensor forward(const at::Tensor& hidden_states);

  nn::Ptr<T5DenseActDense> DenseReluDense;
  nn::Ptr<T5LayerNorm> layer_norm;
};

// Its processor is transformers' "sdpa" attention.
class T5Attention : public nn::AttentionModule {
 public:
  T5Attention(const T5Config& config, bool has_relative_attention_bias);

  struct Output {
    at::Tensor hidden_states;  // [batch, tokens, channels]
    at::Tensor position_bias;  // [1 or batch, heads, query tokens, key tokens], the mask in it
    std::vector<at::Tensor> tensors() const { return {hidden_states}; }
    template <class F>
    void each_tensor(F&& f) {
      nn::each_tensor(hidden_states, f);
      nn::each_tensor(position_bias, f);
    }
  };
  // mask: bool, true attends, or undefined. position_bias: what the first layer returned; undefined
  // in the first layer.
  Output forward(const at::Tensor& hidden_states, const at::Tensor& mask,
                 const at::Tensor& position_bias);
  std::vector<std::string> available_processors() const override { return {"sdpa"}; }
  std::string processor_name() const override { return "sdpa"; }
  void set_processor(const std::string& name) override;

  nn::Ptr<nn::Linear> q, k, v, o;
  nn::Ptr<nn::Embedding> relative_attention_bias;  // of the first layer only

 private:
  // [1, heads, query tokens, key tokens]
  at::Tensor compute_bias(int64_t tokens, at::Device device);

  int64_t num_heads_, num_buckets_, max_distance_;
};

class T5LayerSelfAttention : public nn::Module {
 public:
  T5LayerSelfAttention(const T5Config& config, bool has_relative_attention_bias);
  T5Attention::Output forward(const at::Tensor& hidden_states, const at::Tensor& mask,
                              const at::Tensor& position_bias);

  nn::Ptr<T5Attention> SelfAttention;
  nn::Ptr<T5LayerNorm> layer_norm;
};

class T5Block : public nn::Module {
 public:
  T5Block(const T5Config& config, bool has_relative_attention_bias);
  T5Attention::Output forward(const at::Tensor& hidden_states, const at::Tensor& mask,
                              const at::Tensor& position_bias);

  nn::Ptr<nn::Container> layer;
  nn::Ptr<T5LayerSelfAttention> self_attention;  // layer.0
  nn::Ptr<T5LayerFF> feed_forward;               // layer.1
};

class T5Stack : public nn::Module {
 public:
  explicit T5Stack(const T5Config& config);
  // Through the first `num_blocks` blocks; after all of them and the norm where `with_norm`. The
  // states before each block, and the normed result, are offered to `tap`.
  at::Tensor forward(const at::Tensor& inputs_embeds, const at::Tensor& mask, int64_t num_blocks,
                     bool with_norm, HiddenStateTap* tap);

  nn::Ptr<nn::ModuleList<T5Block>> block;
  nn::Ptr<T5LayerNorm> final_layer_norm;
};

// encoder.embed_tokens is `shared`: tied, and registered under that name only, as Python saves it.
class T5EncoderModel : public TransformersModel {
 public:
  using Config = T5Config;
  // Throws ArgumentError for a config that cannot work.
  explicit T5EncoderModel(T5Config config);
  std::string class_name() const override { return "T5EncoderModel"; }
  nlohmann::ordered_json config_json() const override;
  // `wo` stays float32 in float16 (not in bfloat16: transformers' rule for _keep_in_fp32_modules).
  Traits traits() const override;
  // Inputs: input_ids or inputs_embeds, attention_mask; arguments output_hidden_states, outputs
  // (names of those that are wanted). Outputs: last_hidden_state, hidden_states.N (the last of them
  // is last_hidden_state).
  NamedTensors forward_named(const std::string& method, const NamedTensors& inputs,
                             const nlohmann::json& arguments) override;
  // Drops the decoder of a whole T5.
  std::string map_key(const std::string& checkpoint_key) const override;

  struct Output {
    at::Tensor last_hidden_state;  // [batch, tokens, channels]; undefined if it is not wanted
    std::vector<at::Tensor> hidden_states;  // those that are wanted
    std::vector<at::Tensor> tensors() const { return {last_hidden_state}; }
    template <class F>
    void each_tensor(F&& f) {
      nn::each_tensor(last_hidden_state, f);
      nn::each_tensor(hidden_states, f);
    }
  };
  // input_ids [batch, tokens], or inputs_embeds [batch, tokens, channels]: one of them;
  // attention_mask [batch, tokens] or undefined.
  Output forward(const at::Tensor& input_ids, const at::Tensor& attention_mask = {},
                 const at::Tensor& inputs_embeds = {}, const TextOutputs& wanted = {});
  std::vector<std::string> unused_modules(const std::string& method,
                                          const nlohmann::json& arguments) const override;
  Costs costs(const Workload& workload) const override;

  const T5Config& config() const { return config_; }

  nn::Ptr<nn::Embedding> shared;
  nn::Ptr<T5Stack> encoder;

 protected:
  std::vector<std::string> output_names() const override { return {"last_hidden_state"}; }

 private:
  T5Config config_;
};

}  // namespace ferry::models
