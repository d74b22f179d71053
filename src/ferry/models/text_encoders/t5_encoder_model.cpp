#include "ferry/models/text_encoders/t5_encoder_model.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "ferry/base/error.h"
#include "ferry/models/costs.h"

namespace ferry::models {

namespace {

// Keeps float16 activations finite, as T5Block does, without waiting for the device.
at::Tensor clamp_half(const at::Tensor& x) {
  if (x.scalar_type() != at::kHalf) return x;
  constexpr double largest = 65504.0;
  at::Tensor limit = at::where(x.isinf().any(), largest - 1000, largest).to(x.scalar_type());
  return at::clamp(x, -limit, limit);
}

double lowest(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return -65504.0;
    case at::kBFloat16:
      return static_cast<double>(std::numeric_limits<at::BFloat16>::lowest());
    case at::kDouble:
      return std::numeric_limits<double>::lowest();
    default:
      return std::numeric_limits<float>::lowest();
  }
}

// T5Attention._relative_position_bucket, for both directions. relative_position: int64, any shape.
at::Tensor relative_position_bucket(at::Tensor relative_position, int64_t num_buckets,
                                    int64_t max_distance) {
  num_buckets /= 2;
  at::Tensor buckets = (relative_position > 0).to(at::kLong) * num_buckets;
  relative_position = relative_position.abs();
  // Half of the buckets are for exact distances, half for logarithmically wider ones.
  int64_t max_exact = num_buckets / 2;
  at::Tensor is_small = relative_position < max_exact;
  double span = std::log(static_cast<double>(max_distance) / static_cast<double>(max_exact));
  at::Tensor large = max_exact + (at::log(relative_position.to(at::kFloat) / max_exact) / span *
                                  (num_buckets - max_exact))
                                     .to(at::kLong);
  large = at::minimum(large, at::full_like(large, num_buckets - 1));
  return buckets + at::where(is_small, relative_position, large);
}

void check_config(const T5Config& config) {
  if (config.is_decoder)
    throw_error<ArgumentError>("T5EncoderModel: is_decoder is set, expected an encoder");
  auto size = [](const char* key, int64_t value, int64_t least = 1, int64_t most = kMostChannels) {
    check_size("T5EncoderModel", key, value, least, most);
  };
  size("vocab_size", config.vocab_size, 1, kMostTokens);
  size("d_model", config.d_model);
  size("d_kv", config.d_kv);
  size("d_ff", config.d_ff);
  size("num_layers", config.num_layers, 0, kMostLayers);
  size("num_heads", config.num_heads);
  size("num_heads * d_kv", config.num_heads * config.d_kv);
  size("relative_attention_num_buckets", config.relative_attention_num_buckets, 4);
  size("relative_attention_max_distance", config.relative_attention_max_distance,
       config.relative_attention_num_buckets / 4 + 1, kMostTokens);
}

}  // namespace

std::string T5Config::dense_act_fn() const {
  if (feed_forward_proj == "gated-gelu") return "gelu_new";
  return is_gated_act() ? feed_forward_proj.substr(6) : feed_forward_proj;
}

T5DenseActDense::T5DenseActDense(const T5Config& config)
    : activation_(nn::get_activation(config.dense_act_fn())) {
  auto linear = [&](const char* name, int64_t in, int64_t out) {
    return register_module(name, nn::make<nn::Linear>(in, out, /*with_bias=*/false));
  };
  if (config.is_gated_act()) {
    wi_0 = linear("wi_0", config.d_model, config.d_ff);
    wi_1 = linear("wi_1", config.d_model, config.d_ff);
  } else {
    wi = linear("wi", config.d_model, config.d_ff);
  }
  wo = linear("wo", config.d_ff, config.d_model);
}

at::Tensor T5DenseActDense::forward(const at::Tensor& hidden_states) {
  at::Tensor x;
  if (wi) {
    x = activation_(wi(hidden_states));
  } else {
    at::Tensor gate = activation_(wi_0(hidden_states));
    x = gate * wi_1(hidden_states);
  }
  // `wo` may be kept in float32.
  at::ScalarType dtype = wo->weight.defined() ? wo->weight.scalar_type() : x.scalar_type();
  if (at::isFloatingType(dtype)) x = x.to(dtype);
  return wo(x);
}

T5LayerFF::T5LayerFF(const T5Config& config) {
  DenseReluDense = register_module("DenseReluDense", nn::make<T5DenseActDense>(config));
  layer_norm = register_module("layer_norm",
                               nn::make<T5LayerNorm>(config.d_model, config.layer_norm_epsilon));
}

at::Tensor T5LayerFF::forward(const at::Tensor& hidden_states) {
  return hidden_states + DenseReluDense(layer_norm(hidden_states));
}

T5Attention::T5Attention(const T5Config& config, bool has_relative_attention_bias)
    : num_heads_(config.num_heads),
      num_buckets_(config.relative_attention_num_buckets),
      max_distance_(config.relative_attention_max_distance) {
  int64_t inner = config.num_heads * config.d_kv;
  auto linear = [&](const char* name, int64_t in, int64_t out) {
    return register_module(name, nn::make<nn::Linear>(in, out, /*with_bias=*/false));
  };
  q = linear("q", config.d_model, inner);
  k = linear("k", config.d_model, inner);
  v = linear("v", config.d_model, inner);
  o = linear("o", inner, config.d_model);
  if (has_relative_attention_bias) {
    relative_attention_bias = register_module("relative_attention_bias",
                                              nn::make<nn::Embedding>(num_buckets_, num_heads_));
  }
}

void T5Attention::set_processor(const std::string& name) {
  if (name != "sdpa")
    throw_error<ArgumentError>("T5Attention: unknown processor \"{}\"; it has: sdpa", name);
}

at::Tensor T5Attention::compute_bias(int64_t tokens, at::Device device) {
  at::Tensor position = at::arange(tokens, at::TensorOptions().dtype(at::kLong).device(device));
  at::Tensor relative =
      position.unsqueeze(0) - position.unsqueeze(1);  // [query tokens, key tokens]
  at::Tensor values =
      relative_attention_bias(relative_position_bucket(relative, num_buckets_, max_distance_));
  return values.permute({2, 0, 1}).unsqueeze(0);
}

T5Attention::Output T5Attention::forward(const at::Tensor& hidden_states, const at::Tensor& mask,
                                         const at::Tensor& position_bias) {
  auto split_heads = [&](const at::Tensor& x) { return x.unflatten(-1, {num_heads_, -1}); };
  at::Tensor query = split_heads(q(hidden_states));  // [batch, tokens, heads, head_dim]
  at::Tensor key = split_heads(k(hidden_states));
  at::Tensor value = split_heads(v(hidden_states));
  at::Tensor bias = position_bias;
  if (!bias.defined()) {
    bias = compute_bias(hidden_states.size(1), hidden_states.device());
    // Once for all layers; Python applies the same mask in each.
    if (mask.defined()) bias = at::where(mask, bias, lowest(key.scalar_type()));
    bias = bias.to(query.scalar_type()).contiguous();
  }
  nn::AttentionOptions options;
  options.mask = bias;
  options.scale = 1.0;  // T5 does not scale the scores
  options.backend = attention_backend();
  at::Tensor attended = nn::dispatch_attention(query, key, value, options);
  return {o(attended.flatten(2)), bias};
}

T5LayerSelfAttention::T5LayerSelfAttention(const T5Config& config,
                                           bool has_relative_attention_bias) {
  SelfAttention =
      register_module("SelfAttention", nn::make<T5Attention>(config, has_relative_attention_bias));
  layer_norm = register_module("layer_norm",
                               nn::make<T5LayerNorm>(config.d_model, config.layer_norm_epsilon));
}

T5Attention::Output T5LayerSelfAttention::forward(const at::Tensor& hidden_states,
                                                  const at::Tensor& mask,
                                                  const at::Tensor& position_bias) {
  T5Attention::Output attention = SelfAttention(layer_norm(hidden_states), mask, position_bias);
  return {hidden_states + attention.hidden_states, attention.position_bias};
}

T5Block::T5Block(const T5Config& config, bool has_relative_attention_bias) {
  layer = register_module("layer", nn::make<nn::Container>());
  self_attention =
      layer->add("0", nn::make<T5LayerSelfAttention>(config, has_relative_attention_bias));
  feed_forward = layer->add("1", nn::make<T5LayerFF>(config));
}

T5Attention::Output T5Block::forward(const at::Tensor& hidden_states, const at::Tensor& mask,
                                     const at::Tensor& position_bias) {
  T5Attention::Output attention = self_attention(hidden_states, mask, position_bias);
  at::Tensor x = clamp_half(attention.hidden_states);
  return {clamp_half(feed_forward(x)), attention.position_bias};
}

T5Stack::T5Stack(const T5Config& config) {
  block = register_module("block", nn::make<nn::ModuleList<T5Block>>());
  for (int64_t i = 0; i < config.num_layers; ++i)
    block->push_back(nn::make<T5Block>(config, i == 0));
  final_layer_norm = register_module(
      "final_layer_norm", nn::make<T5LayerNorm>(config.d_model, config.layer_norm_epsilon));
}

at::Tensor T5Stack::forward(const at::Tensor& inputs_embeds, const at::Tensor& mask,
                            int64_t num_blocks, bool with_norm, HiddenStateTap* tap) {
  at::Tensor x = inputs_embeds, position_bias;
  for (int64_t i = 0; i < num_blocks; ++i) {
    tap->offer(i, x);
    T5Attention::Output output = (*block)[i](x, mask, position_bias);
    x = output.hidden_states;
    position_bias = output.position_bias;
  }
  if (with_norm) x = final_layer_norm(x);
  tap->offer(num_blocks, x);
  return x;
}

T5EncoderModel::T5EncoderModel(T5Config config) : config_(std::move(config)) {
  check_config(config_);
  shared = register_module("shared", nn::make<nn::Embedding>(config_.vocab_size, config_.d_model));
  encoder = register_module("encoder", nn::make<T5Stack>(config_));
}

nlohmann::ordered_json T5EncoderModel::config_json() const {
  nlohmann::ordered_json json = config_to_json(config_);
  // What the Python class derives and writes.
  if (!config_.num_decoder_layers) json["num_decoder_layers"] = config_.num_layers;
  json["is_encoder_decoder"] = false;
  json["use_cache"] = false;
  json["dense_act_fn"] = config_.dense_act_fn();
  json["is_gated_act"] = config_.is_gated_act();
  if (!json.contains("tie_word_embeddings")) json["tie_word_embeddings"] = true;
  return finish_config(std::move(json), "t5");
}

Traits T5EncoderModel::traits() const {
  Traits traits;
  traits.keep_in_fp32_modules = {"wo"};
  traits.no_split_modules = {"T5Block"};
  traits.tied_keys = {{"encoder.embed_tokens.weight", "shared.weight"}};
  traits.supports_gradient_checkpointing = true;
  return traits;
}

std::string T5EncoderModel::map_key(const std::string& checkpoint_key) const {
  if (checkpoint_key.starts_with("decoder.") || checkpoint_key == "lm_head.weight") return "";
  if (checkpoint_key == "encoder.embed_tokens.weight") return "shared.weight";
  return checkpoint_key;
}

namespace {

struct T5Depth {
  int64_t num_blocks;
  bool with_norm;
};

// What has to run for the wanted outputs.
T5Depth depth_for(const TextOutputs& wanted, const HiddenStateTap& tap, int64_t num_layers) {
  const int64_t last = wanted.last_hidden_state ? num_layers : tap.last_entry();
  return {std::max<int64_t>(last, 0), last == num_layers};
}

}  // namespace

T5EncoderModel::Output T5EncoderModel::forward(const at::Tensor& input_ids,
                                               const at::Tensor& attention_mask,
                                               const at::Tensor& inputs_embeds,
                                               const TextOutputs& wanted) {
  if (input_ids.defined() == inputs_embeds.defined()) {
    throw_error<ArgumentError>(
        "T5EncoderModel: expected one of input_ids and inputs_embeds, got {}",
        input_ids.defined() ? "both" : "neither");
  }
  at::Tensor x = inputs_embeds.defined() ? inputs_embeds : shared(input_ids);
  at::Tensor mask = expand_attention_mask(attention_mask, x.size(1));
  HiddenStateTap tap(wanted, config_.num_layers + 1);
  const T5Depth depth = depth_for(wanted, tap, config_.num_layers);
  x = encoder(x, mask, depth.num_blocks, depth.with_norm, &tap);
  Output output;
  if (wanted.last_hidden_state) output.last_hidden_state = x;
  output.hidden_states = tap.take();
  return output;
}

std::vector<std::string> T5EncoderModel::unused_modules(const std::string&,
                                                        const nlohmann::json& arguments) const {
  const TextOutputs wanted = wanted_outputs(arguments);
  const T5Depth depth =
      depth_for(wanted, HiddenStateTap(wanted, config_.num_layers + 1), config_.num_layers);
  std::vector<std::string> unused;
  for (int64_t i = depth.num_blocks; i < config_.num_layers; ++i)
    unused.push_back("encoder.block." + std::to_string(i));
  if (!depth.with_norm) unused.emplace_back("encoder.final_layer_norm");
  return unused;
}

NamedTensors T5EncoderModel::forward_named(const std::string& method, const NamedTensors& inputs,
                                           const nlohmann::json& arguments) {
  TextInputs in =
      text_inputs(method, inputs, arguments, "inputs_embeds", /*ids_are_required=*/false);
  Output output =
      call([&] { return forward(in.input_ids, in.attention_mask, in.other, in.wanted); });
  NamedTensors named;
  if (in.wanted.last_hidden_state) named["last_hidden_state"] = output.last_hidden_state;
  add_hidden_states(named, in.wanted, output.hidden_states);
  return named;
}

Costs T5EncoderModel::costs(const Workload& workload) const {
  const int64_t inner = config_.num_heads * config_.d_kv;
  // gelu's tanh form is a chain of operations.
  return encoder_costs({.tokens = workload.text_tokens,
                        .dim = std::max(config_.d_model, inner),
                        .attention_dim = inner,
                        .ff = config_.d_ff,
                        .heads = config_.num_heads,
                        .wide = config_.is_gated_act() ? 8.0 : 7.0},
                       workload);
}

}  // namespace ferry::models
