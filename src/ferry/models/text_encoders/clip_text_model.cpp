#include "ferry/models/text_encoders/clip_text_model.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "ferry/base/error.h"
#include "ferry/models/costs.h"

namespace ferry::models {

namespace {

bool drop_prefix(std::string& key, std::string_view prefix) {
  if (!key.starts_with(prefix)) return false;
  key.erase(0, prefix.size());
  return true;
}

// Keys of a whole CLIP checkpoint that no text encoder uses, and buffers that old versions saved.
bool belongs_elsewhere(const std::string& key) {
  return key.starts_with("vision_model.") || key.starts_with("visual_projection.") ||
         key == "logit_scale" || key.ends_with("embeddings.position_ids");
}

void check_config(const CLIPTextConfig& config) {
  auto size = [](const char* key, int64_t value, int64_t least = 1, int64_t most = kMostChannels) {
    check_size("CLIPTextModel", key, value, least, most);
  };
  size("vocab_size", config.vocab_size, 1, kMostTokens);
  size("hidden_size", config.hidden_size);
  size("intermediate_size", config.intermediate_size);
  size("projection_dim", config.projection_dim.value_or(1));
  size("num_hidden_layers", config.num_hidden_layers, 0, kMostLayers);
  size("num_attention_heads", config.num_attention_heads);
  size("max_position_embeddings", config.max_position_embeddings);
  if (config.hidden_size % config.num_attention_heads != 0) {
    throw_error<ArgumentError>(
        "CLIPTextModel: hidden_size {} is no multiple of num_attention_heads {}",
        config.hidden_size, config.num_attention_heads);
  }
  if (!config.eos_token_id) {
    throw_error<ArgumentError>(
        "CLIPTextModel: eos_token_id is null, but the pooled output is taken there");
  }
}

Traits clip_traits() {
  Traits traits;
  traits.no_split_modules = {"CLIPTextEmbeddings", "CLIPEncoderLayer", "CLIPVisionEmbeddings"};
  traits.supports_gradient_checkpointing = true;
  return traits;
}

double eps(const CLIPTextConfig& config) {
  return config.layer_norm_eps.value_or(1e-5);
}

}  // namespace

CLIPTextEmbeddings::CLIPTextEmbeddings(const CLIPTextConfig& config)
    : max_positions_(config.max_position_embeddings) {
  token_embedding = register_module("token_embedding",
                                    nn::make<nn::Embedding>(config.vocab_size, config.hidden_size));
  position_embedding = register_module("position_embedding",
                                       nn::make<nn::Embedding>(max_positions_, config.hidden_size));
}

at::Tensor CLIPTextEmbeddings::forward(const at::Tensor& input_ids,
                                       const at::Tensor& position_ids) {
  int64_t tokens = input_ids.size(-1);
  if (tokens > max_positions_) {
    throw_error<ArgumentError>(
        "CLIP: got {} tokens, expected at most {} (max_position_embeddings); cut the prompt's "
        "tokens",
        tokens, max_positions_);
  }
  at::Tensor positions =
      position_ids.defined()
          ? position_ids
          : at::arange(tokens, input_ids.options().dtype(at::kLong)).unsqueeze(0);
  return token_embedding(input_ids) + position_embedding(positions);
}

CLIPAttention::CLIPAttention(const CLIPTextConfig& config)
    : num_heads_(config.num_attention_heads) {
  int64_t dim = config.hidden_size;
  k_proj = register_module("k_proj", nn::make<nn::Linear>(dim, dim));
  v_proj = register_module("v_proj", nn::make<nn::Linear>(dim, dim));
  q_proj = register_module("q_proj", nn::make<nn::Linear>(dim, dim));
  out_proj = register_module("out_proj", nn::make<nn::Linear>(dim, dim));
}

void CLIPAttention::set_processor(const std::string& name) {
  if (name != "sdpa")
    throw_error<ArgumentError>("CLIPAttention: unknown processor \"{}\"; it has: sdpa", name);
}

at::Tensor CLIPAttention::forward(const at::Tensor& hidden_states, const at::Tensor& mask) {
  auto split_heads = [&](const at::Tensor& x) { return x.unflatten(-1, {num_heads_, -1}); };
  at::Tensor query = split_heads(q_proj(hidden_states));  // [batch, tokens, heads, head_dim]
  at::Tensor key = split_heads(k_proj(hidden_states));
  at::Tensor value = split_heads(v_proj(hidden_states));
  nn::AttentionOptions options;
  options.mask = mask;
  options.is_causal = !mask.defined() && query.size(1) > 1;
  options.backend = attention_backend();
  at::Tensor attended = nn::dispatch_attention(query, key, value, options);
  return out_proj(attended.flatten(2));  // [batch, tokens, channels]
}

CLIPMLP::CLIPMLP(const CLIPTextConfig& config)
    : activation_(nn::get_activation(config.hidden_act)) {
  fc1 = register_module("fc1", nn::make<nn::Linear>(config.hidden_size, config.intermediate_size));
  fc2 = register_module("fc2", nn::make<nn::Linear>(config.intermediate_size, config.hidden_size));
}

at::Tensor CLIPMLP::forward(const at::Tensor& hidden_states) {
  return fc2(activation_(fc1(hidden_states)));
}

CLIPEncoderLayer::CLIPEncoderLayer(const CLIPTextConfig& config) {
  self_attn = register_module("self_attn", nn::make<CLIPAttention>(config));
  layer_norm1 =
      register_module("layer_norm1", nn::make<nn::LayerNorm>(config.hidden_size, eps(config)));
  mlp = register_module("mlp", nn::make<CLIPMLP>(config));
  layer_norm2 =
      register_module("layer_norm2", nn::make<nn::LayerNorm>(config.hidden_size, eps(config)));
}

at::Tensor CLIPEncoderLayer::forward(const at::Tensor& hidden_states, const at::Tensor& mask) {
  at::Tensor x = hidden_states + self_attn(layer_norm1(hidden_states), mask);
  return x + mlp(layer_norm2(x));
}

CLIPEncoder::CLIPEncoder(const CLIPTextConfig& config) {
  layers = register_module("layers", nn::make<nn::ModuleList<CLIPEncoderLayer>>());
  for (int64_t i = 0; i < config.num_hidden_layers; ++i)
    layers->push_back(nn::make<CLIPEncoderLayer>(config));
}

at::Tensor CLIPEncoder::forward(const at::Tensor& inputs_embeds, const at::Tensor& mask,
                                int64_t num_layers, HiddenStateTap* tap) {
  at::Tensor x = inputs_embeds;
  tap->offer(0, x);
  for (int64_t i = 0; i < num_layers; ++i) {
    x = (*layers)[i](x, mask);
    tap->offer(i + 1, x);
  }
  return x;
}

CLIPTextModel::CLIPTextModel(CLIPTextConfig config) : config_(std::move(config)) {
  check_config(config_);
  embeddings = register_module("embeddings", nn::make<CLIPTextEmbeddings>(config_));
  encoder = register_module("encoder", nn::make<CLIPEncoder>(config_));
  final_layer_norm = register_module("final_layer_norm",
                                     nn::make<nn::LayerNorm>(config_.hidden_size, eps(config_)));
}

nlohmann::ordered_json CLIPTextModel::config_json() const {
  return finish_config(config_to_json(config_), "clip_text_model");
}

Traits CLIPTextModel::traits() const {
  return clip_traits();
}

std::string CLIPTextModel::map_key(const std::string& checkpoint_key) const {
  std::string key = checkpoint_key;
  if (belongs_elsewhere(key) || key.starts_with("text_projection.")) return "";
  drop_prefix(key, "text_model.");
  return key;
}

int64_t CLIPTextModel::layers_for(const TextOutputs& wanted, const HiddenStateTap& tap) const {
  const bool all = wanted.last_hidden_state || wanted.pooled;
  return all ? config_.num_hidden_layers : std::max<int64_t>(tap.last_entry(), 0);
}

CLIPTextOutput CLIPTextModel::forward(const at::Tensor& input_ids, const at::Tensor& attention_mask,
                                      const at::Tensor& position_ids, const TextOutputs& wanted) {
  at::Tensor ids = input_ids.reshape({-1, input_ids.size(-1)});  // [batch, tokens]
  int64_t tokens = ids.size(1);
  at::Tensor mask = expand_attention_mask(attention_mask, tokens);
  if (mask.defined()) {
    mask = mask & at::ones({tokens, tokens}, mask.options()).tril();  // [batch, 1, tokens, tokens]
  }
  HiddenStateTap tap(wanted, config_.num_hidden_layers + 1);
  at::Tensor x = embeddings(ids, position_ids);
  x = encoder(x, mask, layers_for(wanted, tap), &tap);
  CLIPTextOutput output;
  output.hidden_states = tap.take();
  if (!wanted.last_hidden_state && !wanted.pooled) return output;
  output.last_hidden_state = final_layer_norm(x);
  if (!wanted.pooled) return output;

  at::Tensor end = *config_.eos_token_id == 2
                       ? ids.to(at::kInt).argmax(-1)
                       : (ids.to(at::kInt) == *config_.eos_token_id).to(at::kInt).argmax(-1);
  at::Tensor rows = at::arange(ids.size(0), end.options());
  output.pooler_output = output.last_hidden_state.index({rows, end});  // [batch, channels]
  if (!wanted.last_hidden_state) output.last_hidden_state = at::Tensor();
  return output;
}

std::vector<std::string> CLIPTextModel::unused_modules(const TextOutputs& wanted) const {
  const HiddenStateTap tap(wanted, config_.num_hidden_layers + 1);
  std::vector<std::string> unused;
  for (int64_t i = layers_for(wanted, tap); i < config_.num_hidden_layers; ++i)
    unused.push_back("encoder.layers." + std::to_string(i));
  if (!wanted.last_hidden_state && !wanted.pooled) unused.emplace_back("final_layer_norm");
  return unused;
}

std::vector<std::string> CLIPTextModel::unused_modules(const std::string&,
                                                       const nlohmann::json& arguments) const {
  return unused_modules(wanted_outputs(arguments));
}

NamedTensors CLIPTextModel::forward_named(const std::string& method, const NamedTensors& inputs,
                                          const nlohmann::json& arguments) {
  TextInputs in = text_inputs(method, inputs, arguments, "position_ids", /*ids_are_required=*/true);
  CLIPTextOutput output =
      call([&] { return forward(in.input_ids, in.attention_mask, in.other, in.wanted); });
  NamedTensors named;
  if (in.wanted.last_hidden_state) named["last_hidden_state"] = output.last_hidden_state;
  if (in.wanted.pooled) named["pooler_output"] = output.pooler_output;
  add_hidden_states(named, in.wanted, output.hidden_states);
  return named;
}

CLIPTextModelWithProjection::CLIPTextModelWithProjection(CLIPTextConfig config) {
  if (!config.projection_dim) {
    throw_error<ArgumentError>(
        "CLIPTextModelWithProjection: projection_dim is null, expected the output's channels");
  }
  int64_t hidden_size = config.hidden_size, projection_dim = *config.projection_dim;
  text_model = register_module("text_model", nn::make<CLIPTextModel>(std::move(config)));
  text_projection = register_module(
      "text_projection", nn::make<nn::Linear>(hidden_size, projection_dim, /*with_bias=*/false));
}

nlohmann::ordered_json CLIPTextModelWithProjection::config_json() const {
  return finish_config(config_to_json(config()), "clip_text_model");
}

Traits CLIPTextModelWithProjection::traits() const {
  return clip_traits();
}

std::string CLIPTextModelWithProjection::map_key(const std::string& checkpoint_key) const {
  if (belongs_elsewhere(checkpoint_key)) return "";
  // A checkpoint of the text model alone lacks the prefix.
  for (const char* child : {"embeddings.", "encoder.", "final_layer_norm."}) {
    if (checkpoint_key.starts_with(child)) return "text_model." + checkpoint_key;
  }
  return checkpoint_key;
}

CLIPTextModelWithProjection::Output CLIPTextModelWithProjection::forward(
    const at::Tensor& input_ids, const at::Tensor& attention_mask, const at::Tensor& position_ids,
    const TextOutputs& wanted) {
  Output output;
  output.text = text_model(input_ids, attention_mask, position_ids, wanted);
  if (wanted.pooled) output.text_embeds = text_projection(output.text.pooler_output);
  return output;
}

std::vector<std::string> CLIPTextModelWithProjection::unused_modules(
    const std::string&, const nlohmann::json& arguments) const {
  const TextOutputs wanted = wanted_outputs(arguments);
  std::vector<std::string> unused;
  for (const std::string& name : text_model->unused_modules(wanted))
    unused.push_back("text_model." + name);
  if (!wanted.pooled) unused.emplace_back("text_projection");
  return unused;
}

NamedTensors CLIPTextModelWithProjection::forward_named(const std::string& method,
                                                        const NamedTensors& inputs,
                                                        const nlohmann::json& arguments) {
  TextInputs in = text_inputs(method, inputs, arguments, "position_ids", /*ids_are_required=*/true);
  Output output =
      call([&] { return forward(in.input_ids, in.attention_mask, in.other, in.wanted); });
  NamedTensors named;
  if (in.wanted.pooled) named["text_embeds"] = output.text_embeds;
  if (in.wanted.last_hidden_state) named["last_hidden_state"] = output.text.last_hidden_state;
  add_hidden_states(named, in.wanted, output.text.hidden_states);
  return named;
}

// ---- for planning ----

Costs CLIPTextModel::costs(const Workload& workload) const {
  return encoder_costs({.tokens = config_.max_position_embeddings,
                        .dim = config_.hidden_size,
                        .attention_dim = config_.hidden_size,
                        .ff = config_.intermediate_size,
                        .heads = config_.num_attention_heads,
                        .wide = 4},
                       workload);
}

Costs CLIPTextModelWithProjection::costs(const Workload& workload) const {
  return text_model->costs(workload);
}

}  // namespace ferry::models
