#include "ferry/models/transformers/transformer_flux.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

#include "ferry/models/costs.h"
#include "ferry/models/named_inputs.h"

namespace ferry::models {

namespace {

struct Projections {
  at::Tensor query, key, value;  // [batch, tokens, dim]
};

Projections project(const nn::Ptr<nn::Linear>& q, const nn::Ptr<nn::Linear>& k,
                    const nn::Ptr<nn::Linear>& v, const nn::Ptr<nn::Linear>& fused,
                    const at::Tensor& x) {
  if (!fused) return {q(x), k(x), v(x)};
  auto parts = fused(x).chunk(3, -1);
  return {parts[0], parts[1], parts[2]};
}

// [batch, tokens, dim] -> [batch, tokens, heads, head_dim]
at::Tensor split_heads(const at::Tensor& x, int64_t head_dim) {
  return x.unflatten(-1, {-1, head_dim});
}

// float16 overflows in some checkpoints' residual streams.
at::Tensor clip_half(const at::Tensor& x) {
  return x.scalar_type() == at::kHalf ? x.clip(-65504, 65504) : x;
}

// The residual for block `index` of `blocks`, stretched over them.
const at::Tensor& stretched(const std::vector<at::Tensor>& samples, size_t index, size_t blocks) {
  size_t interval = (blocks + samples.size() - 1) / samples.size();
  return samples[index / interval];
}

void check(const FluxTransformer2DConfig& config) {
  auto size = [](const char* key, int64_t value, int64_t least = 1, int64_t most = kMostChannels) {
    check_size("FluxTransformer2DModel", key, value, least, most);
  };
  size("patch_size", config.patch_size, 1, 1 << 8);
  size("in_channels", config.in_channels);
  size("out_channels", config.out_channels.value_or(1));
  size("num_layers", config.num_layers, 0, kMostLayers);
  size("num_single_layers", config.num_single_layers, 0, kMostLayers);
  size("attention_head_dim", config.attention_head_dim);
  size("num_attention_heads", config.num_attention_heads);
  size("num_attention_heads * attention_head_dim", config.inner_dim());
  size("joint_attention_dim", config.joint_attention_dim);
  size("pooled_projection_dim", config.pooled_projection_dim);
  for (int64_t axis : config.axes_dims_rope) {
    size("axes_dims_rope", axis, 0, config.attention_head_dim);
    if (axis % 2 != 0) {
      throw_error<ArgumentError>(
          "FluxTransformer2DModel: axes_dims_rope: got {}, expected even numbers", axis);
    }
  }
  int64_t rope =
      std::accumulate(config.axes_dims_rope.begin(), config.axes_dims_rope.end(), int64_t{0});
  if (rope != config.attention_head_dim) {
    throw_error<ArgumentError>(
        "FluxTransformer2DModel: axes_dims_rope sum up to {}, expected attention_head_dim {}", rope,
        config.attention_head_dim);
  }
}

}  // namespace

FluxAttentionOutput FluxAttnProcessor::run(FluxAttention& attn, const at::Tensor& hidden_states,
                                           const at::Tensor& encoder_hidden_states,
                                           const at::Tensor& attention_mask,
                                           const nn::RotaryEmbedding* image_rotary_emb) const {
  auto [query, key, value] = project(attn.to_q, attn.to_k, attn.to_v, attn.to_qkv, hidden_states);
  query = attn.norm_q(split_heads(query, attn.head_dim()));  // [batch, tokens, heads, head_dim]
  key = attn.norm_k(split_heads(key, attn.head_dim()));
  value = split_heads(value, attn.head_dim());

  if (attn.add_q_proj) {
    auto [text_query, text_key, text_value] =
        project(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.to_added_qkv,
                encoder_hidden_states);
    text_query = attn.norm_added_q(split_heads(text_query, attn.head_dim()));
    text_key = attn.norm_added_k(split_heads(text_key, attn.head_dim()));
    text_value = split_heads(text_value, attn.head_dim());
    query = at::cat({text_query, query}, 1);
    key = at::cat({text_key, key}, 1);
    value = at::cat({text_value, value}, 1);
  }
  if (image_rotary_emb) {
    query = nn::apply_rotary_emb(query, *image_rotary_emb, /*sequence_dim=*/1);
    key = nn::apply_rotary_emb(key, *image_rotary_emb, /*sequence_dim=*/1);
  }

  at::Tensor out = nn::dispatch_attention(
      query, key, value, {.mask = attention_mask, .backend = attn.attention_backend()});
  out = out.flatten(2, 3).to(query.scalar_type());  // [batch, tokens, dim]
  if (!encoder_hidden_states.defined()) return {out, {}};

  int64_t text_tokens = encoder_hidden_states.size(1);
  at::Tensor text = out.narrow(1, 0, text_tokens);
  at::Tensor image = out.narrow(1, text_tokens, out.size(1) - text_tokens);
  return {attn.to_out_0(image.contiguous()), attn.to_add_out(text.contiguous())};
}

FluxAttention::FluxAttention(int64_t dim, const FluxAttentionOptions& options)
    : head_dim_(options.dim_head), processor_(std::make_shared<FluxAttnProcessor>()) {
  int64_t inner_dim = options.heads * options.dim_head;
  norm_q = register_module("norm_q", nn::make<nn::RMSNorm>(head_dim_, options.eps));
  norm_k = register_module("norm_k", nn::make<nn::RMSNorm>(head_dim_, options.eps));
  to_q = register_module("to_q", nn::make<nn::Linear>(dim, inner_dim));
  to_k = register_module("to_k", nn::make<nn::Linear>(dim, inner_dim));
  to_v = register_module("to_v", nn::make<nn::Linear>(dim, inner_dim));
  if (!options.joint) return;
  to_out = register_module("to_out", nn::make<nn::Container>());
  to_out_0 = to_out->add("0", nn::make<nn::Linear>(inner_dim, dim));
  norm_added_q = register_module("norm_added_q", nn::make<nn::RMSNorm>(head_dim_, options.eps));
  norm_added_k = register_module("norm_added_k", nn::make<nn::RMSNorm>(head_dim_, options.eps));
  add_q_proj = register_module("add_q_proj", nn::make<nn::Linear>(dim, inner_dim));
  add_k_proj = register_module("add_k_proj", nn::make<nn::Linear>(dim, inner_dim));
  add_v_proj = register_module("add_v_proj", nn::make<nn::Linear>(dim, inner_dim));
  to_add_out = register_module("to_add_out", nn::make<nn::Linear>(inner_dim, dim));
}

FluxAttentionOutput FluxAttention::forward(const at::Tensor& hidden_states,
                                           const at::Tensor& encoder_hidden_states,
                                           const at::Tensor& attention_mask,
                                           const nn::RotaryEmbedding* image_rotary_emb) {
  return processor_->run(*this, hidden_states, encoder_hidden_states, attention_mask,
                         image_rotary_emb);
}

void FluxAttention::set_processor(const std::string& name) {
  if (name != "FluxAttnProcessor") {
    throw_error<ArgumentError>("FluxAttention: processor '{}' is unknown; known are {}", name,
                               fmt::join(available_processors(), ", "));
  }
  processor_ = std::make_shared<FluxAttnProcessor>();
}

void FluxAttention::set_processor(std::shared_ptr<const FluxAttnProcessor> processor) {
  if (!processor) throw_error<ArgumentError>("FluxAttention: the processor is null");
  processor_ = std::move(processor);
}

void FluxAttention::fuse_projections() {
  if (fused_projections()) return;
  to_qkv = register_module("to_qkv", fuse_linears({to_q, to_k, to_v}));
  if (add_q_proj) {
    to_added_qkv =
        register_module("to_added_qkv", fuse_linears({add_q_proj, add_k_proj, add_v_proj}));
  }
  set_fused_projections(true);
}

void FluxAttention::unfuse_projections() {
  if (!fused_projections()) return;
  unregister_module("to_qkv");
  to_qkv = nullptr;
  if (to_added_qkv) unregister_module("to_added_qkv");
  to_added_qkv = nullptr;
  set_fused_projections(false);
}

FluxTransformerBlock::FluxTransformerBlock(const FluxTransformer2DConfig& config) {
  int64_t dim = config.inner_dim();
  nn::FeedForwardOptions ff_options{.dim_out = dim, .activation_fn = "gelu-approximate"};
  norm1 = register_module("norm1", nn::make<nn::AdaLayerNormZero>(dim));
  norm1_context = register_module("norm1_context", nn::make<nn::AdaLayerNormZero>(dim));
  attn = register_module(
      "attn", nn::make<FluxAttention>(
                  dim, FluxAttentionOptions{config.num_attention_heads, config.attention_head_dim,
                                            /*eps=*/1e-6, /*joint=*/true}));
  norm2 = register_module("norm2", nn::make<nn::LayerNorm>(dim, 1e-6, false));
  ff = register_module("ff", nn::make<nn::FeedForward>(dim, ff_options));
  norm2_context = register_module("norm2_context", nn::make<nn::LayerNorm>(dim, 1e-6, false));
  ff_context = register_module("ff_context", nn::make<nn::FeedForward>(dim, ff_options));
}

FluxStreams FluxTransformerBlock::forward(const at::Tensor& hidden_states,
                                          const at::Tensor& encoder_hidden_states,
                                          const at::Tensor& temb,
                                          const nn::RotaryEmbedding& image_rotary_emb) {
  auto image = norm1(hidden_states, temb);
  auto text = norm1_context(encoder_hidden_states, temb);
  FluxAttentionOutput attention = attn(image.x, text.x, at::Tensor(), &image_rotary_emb);

  // The image stream.
  at::Tensor x =
      nn::add_to_product(image.gate_msa.unsqueeze(1) * attention.hidden_states, hidden_states);
  at::Tensor normed = nn::modulate(norm2(x), image.scale_mlp, image.shift_mlp);
  x = nn::add_to_product(image.gate_mlp.unsqueeze(1) * ff(normed), x);

  // The text stream.
  at::Tensor c = nn::add_to_product(text.gate_msa.unsqueeze(1) * attention.encoder_hidden_states,
                                    encoder_hidden_states);
  normed = nn::modulate(norm2_context(c), text.scale_mlp, text.shift_mlp);
  c = nn::add_to_product(text.gate_mlp.unsqueeze(1) * ff_context(normed), c);
  return {clip_half(c), x};
}

FluxSingleTransformerBlock::FluxSingleTransformerBlock(const FluxTransformer2DConfig& config) {
  int64_t dim = config.inner_dim(), mlp_hidden_dim = 4 * dim;
  norm = register_module("norm", nn::make<nn::AdaLayerNormZeroSingle>(dim));
  proj_mlp = register_module("proj_mlp", nn::make<nn::Linear>(dim, mlp_hidden_dim));
  proj_out = register_module("proj_out", nn::make<nn::Linear>(dim + mlp_hidden_dim, dim));
  attn = register_module(
      "attn", nn::make<FluxAttention>(
                  dim, FluxAttentionOptions{config.num_attention_heads, config.attention_head_dim,
                                            /*eps=*/1e-6, /*joint=*/false}));
}

FluxStreams FluxSingleTransformerBlock::forward(const at::Tensor& hidden_states,
                                                const at::Tensor& encoder_hidden_states,
                                                const at::Tensor& temb,
                                                const nn::RotaryEmbedding& image_rotary_emb) {
  int64_t text_tokens = encoder_hidden_states.size(1);
  at::Tensor residual = at::cat({encoder_hidden_states, hidden_states}, 1);  // [batch, tokens, dim]
  auto normed = norm(residual, temb);
  at::Tensor mlp = at::gelu(proj_mlp(normed.x), "tanh");  // [batch, tokens, 4 * dim]
  at::Tensor attention =
      attn(normed.x, at::Tensor(), at::Tensor(), &image_rotary_emb).hidden_states;

  at::Tensor joined = at::cat({attention, mlp}, 2);
  at::Tensor x = nn::add_to_product(normed.gate_msa.unsqueeze(1) * proj_out(joined), residual);
  x = clip_half(x);
  return {x.narrow(1, 0, text_tokens), x.narrow(1, text_tokens, x.size(1) - text_tokens)};
}

FluxTransformer2DModel::FluxTransformer2DModel(Config config) : config_(std::move(config)) {
  check(config_);
  int64_t dim = config_.inner_dim();
  int64_t out_channels = config_.out_channels.value_or(config_.in_channels);
  pos_embed =
      register_module("pos_embed", nn::make<nn::FluxPosEmbed>(10000, config_.axes_dims_rope));
  time_text_embed = register_module(
      "time_text_embed", nn::make<nn::CombinedTimestepTextProjEmbeddings>(
                             dim, config_.pooled_projection_dim, config_.guidance_embeds));
  context_embedder =
      register_module("context_embedder", nn::make<nn::Linear>(config_.joint_attention_dim, dim));
  x_embedder = register_module("x_embedder", nn::make<nn::Linear>(config_.in_channels, dim));
  transformer_blocks =
      register_module("transformer_blocks", nn::make<nn::ModuleList<FluxTransformerBlock>>());
  for (int64_t i = 0; i < config_.num_layers; ++i) {
    transformer_blocks->push_back(nn::make<FluxTransformerBlock>(config_));
  }
  single_transformer_blocks = register_module(
      "single_transformer_blocks", nn::make<nn::ModuleList<FluxSingleTransformerBlock>>());
  for (int64_t i = 0; i < config_.num_single_layers; ++i) {
    single_transformer_blocks->push_back(nn::make<FluxSingleTransformerBlock>(config_));
  }
  norm_out = register_module("norm_out", nn::make<nn::AdaLayerNormContinuous>(
                                             dim, dim, /*elementwise_affine=*/false, 1e-6));
  proj_out = register_module(
      "proj_out",
      nn::make<nn::Linear>(dim, config_.patch_size * config_.patch_size * out_channels));
}

at::Tensor FluxTransformer2DModel::forward(const at::Tensor& hidden_states,
                                           const at::Tensor& encoder_hidden_states,
                                           const at::Tensor& pooled_projections,
                                           const at::Tensor& timestep, const at::Tensor& img_ids,
                                           const at::Tensor& txt_ids, const at::Tensor& guidance,
                                           const FluxControlnetResiduals& controlnet) {
  if (guidance.defined() != config_.guidance_embeds) {
    throw_error<ArgumentError>("FluxTransformer2DModel: guidance is {}, but guidance_embeds is {}",
                               guidance.defined() ? "given" : "missing", config_.guidance_embeds);
  }
  at::Tensor x = x_embedder(hidden_states);  // [batch, image tokens, dim]
  at::Tensor t = timestep.to(x.scalar_type()) * 1000;
  at::Tensor g = guidance.defined() ? guidance.to(x.scalar_type()) * 1000 : guidance;
  at::Tensor temb = time_text_embed(t, g, pooled_projections);
  at::Tensor c = context_embedder(encoder_hidden_states);  // [batch, text tokens, dim]

  // Ids with a batch dimension are old style: the first of the batch counts.
  at::Tensor ids = at::cat(
      {txt_ids.dim() == 3 ? txt_ids[0] : txt_ids, img_ids.dim() == 3 ? img_ids[0] : img_ids}, 0);
  nn::RotaryEmbedding image_rotary_emb = pos_embed(ids);

  for (size_t i = 0; i < transformer_blocks->size(); ++i) {
    FluxStreams streams = (*transformer_blocks)[i](x, c, temb, image_rotary_emb);
    c = std::move(streams.encoder_hidden_states);
    x = std::move(streams.hidden_states);
    const auto& samples = controlnet.block_samples;
    if (samples.empty()) continue;
    x = x + (controlnet.blocks_repeat ? samples[i % samples.size()]
                                      : stretched(samples, i, transformer_blocks->size()));
  }
  for (size_t i = 0; i < single_transformer_blocks->size(); ++i) {
    FluxStreams streams = (*single_transformer_blocks)[i](x, c, temb, image_rotary_emb);
    c = std::move(streams.encoder_hidden_states);
    x = std::move(streams.hidden_states);
    const auto& samples = controlnet.single_block_samples;
    if (!samples.empty()) x = x + stretched(samples, i, single_transformer_blocks->size());
  }
  return proj_out(norm_out(x, temb));
}

Traits FluxTransformer2DModel::traits() const {
  Traits traits;
  traits.no_split_modules = {"FluxTransformerBlock", "FluxSingleTransformerBlock"};
  traits.skip_layerwise_casting_patterns = {"pos_embed", "norm"};
  traits.repeated_blocks = {"FluxTransformerBlock", "FluxSingleTransformerBlock"};
  traits.supports_gradient_checkpointing = true;
  return traits;
}

NamedTensors FluxTransformer2DModel::forward_named(const std::string& method,
                                                   const NamedTensors& inputs,
                                                   const nlohmann::json& arguments) {
  check_method(method);
  NamedInputs in("FluxTransformer2DModel.forward", inputs, arguments);
  at::Tensor hidden_states = in.required("hidden_states");
  at::Tensor encoder_hidden_states = in.required("encoder_hidden_states");
  at::Tensor pooled_projections = in.required("pooled_projections");
  at::Tensor timestep = in.required("timestep");
  at::Tensor img_ids = in.required("img_ids");
  at::Tensor txt_ids = in.required("txt_ids");
  at::Tensor guidance = in.optional("guidance");
  FluxControlnetResiduals controlnet{in.list("controlnet_block_samples"),
                                     in.list("controlnet_single_block_samples"),
                                     in.argument("controlnet_blocks_repeat", false)};
  in.argument("return_dict", true);
  auto attention_kwargs = in.argument("joint_attention_kwargs", nlohmann::json::object());
  in.finish();
  if (!attention_kwargs.empty()) {
    throw_error<ArgumentError>(
        "FluxTransformer2DModel.forward: joint_attention_kwargs {} are not supported",
        attention_kwargs.dump());
  }
  return {{"sample", call([&] {
             return forward(hidden_states, encoder_hidden_states, pooled_projections, timestep,
                            img_ids, txt_ids, guidance, controlnet);
           })}};
}

// ---- for planning ----

namespace {

LayerLoad flux_load(const FluxTransformer2DConfig& config, const std::string& name,
                    const Workload& w) {
  auto name_has = [&](const char* part) { return name.find(part) != std::string::npos; };
  const double image = static_cast<double>(w.batch * image_tokens(w));
  const double text = static_cast<double>(w.batch * w.text_tokens);
  const double tokens = (image + text) / static_cast<double>(w.batch);
  // Scores and their product with the values: 2 * 2 * tokens^2 * dim.
  const double attention =
      4.0 * static_cast<double>(w.batch * config.inner_dim()) * tokens * tokens;
  if (name_has("time_text_embed") || name_has("norm"))
    return {static_cast<double>(w.batch), 0};  // modulation: a row a picture
  if (name.starts_with("single_transformer_blocks"))
    return {image + text, name.ends_with(".proj_out") ? attention : 0};
  if (name == "context_embedder" || name_has("ff_context") || name_has(".add_")) return {text, 0};
  if (name_has("to_add_out")) return {text, 0};
  return {image, name_has("attn.to_out") ? attention : 0};
}

// What the caller holds during a block, and the rotation's angles in float32.
double flux_held_outside(const FluxTransformer2DConfig& c, const Workload& w) {
  const double image = static_cast<double>(w.batch * image_tokens(w));
  const double text = static_cast<double>(w.batch * w.text_tokens);
  return text * static_cast<double>(c.joint_attention_dim) +
         image * static_cast<double>(c.in_channels) +
         (image + text) * static_cast<double>(c.attention_head_dim) * 2 * 4 /
             static_cast<double>(c10::elementSize(w.dtype));
}

double flux_values(const FluxTransformer2DConfig& c, const Workload& w) {
  const double dim = static_cast<double>(c.inner_dim());
  const double image = static_cast<double>(w.batch * image_tokens(w));
  const double text = static_cast<double>(w.batch * w.text_tokens);
  // A single block where its halves are joined: input, residual, normed, attention and MLP (4), the
  // joined (5), what comes out and its product with the gate. On a device the rotation's float32
  // copies come to more: input, residual, normed, MLP (4), query, key, value and 8 for copies.
  double widths = w.on_cpu ? 15 : 18;
  // Attention on a CPU sums up in float32.
  const auto item = static_cast<double>(c10::elementSize(w.dtype));
  if (w.on_cpu && item < 4) widths += 1.5;
  // A double block: both streams in and out, normed and after attention, and twice the widened
  // image stream.
  const double twice = 6 * (image + text) + 2 * 4 * image;
  return dim * std::max(widths * (image + text), twice) + flux_held_outside(c, w);
}

}  // namespace

Costs FluxTransformer2DModel::costs(const Workload& w) const {
  // Between blocks: a block's inputs, which its caller still has, and its outputs.
  const auto tokens = static_cast<double>(w.batch * (image_tokens(w) + w.text_tokens));
  return {.load = [config = config_,
                   w](const std::string& layer) { return flux_load(config, layer, w); },
          .values = flux_values(config_, w),
          .held_values = 2 * tokens * static_cast<double>(config_.inner_dim()) +
                         flux_held_outside(config_, w)};
}

}  // namespace ferry::models
