#include "ferry/models/costs.h"

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "ferry/models/autoencoders/autoencoder_kl.h"
#include "ferry/models/text_encoders/clip_text_model.h"
#include "ferry/models/text_encoders/t5_encoder_model.h"
#include "ferry/models/transformers/transformer_flux.h"
#include "ferry/weights/slot.h"

namespace ferry::models {

namespace {

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

// A token is 2 x 2 latents.
int64_t flux_image_tokens(const Workload& w) {
  const int64_t pixels = 2 * w.vae_scale_factor;
  return (w.height + pixels - 1) / pixels * ((w.width + pixels - 1) / pixels);
}

// Rows that the layer's weight is multiplied with; attention products of what it follows.
struct LayerLoad {
  double rows = 0;
  double attention_flops = 0;
};

LayerLoad flux_load(const FluxTransformer2DModel& model, const std::string& name,
                    const Workload& w) {
  const double image = static_cast<double>(w.batch * flux_image_tokens(w));
  const double text = static_cast<double>(w.batch * w.text_tokens);
  const double tokens = (image + text) / static_cast<double>(w.batch);
  // Scores and their product with the values: 2 * 2 * tokens^2 * dim.
  const double attention =
      4.0 * static_cast<double>(w.batch * model.config().inner_dim()) * tokens * tokens;
  if (contains(name, "time_text_embed") || contains(name, "norm"))
    return {static_cast<double>(w.batch), 0};  // modulation: a row a picture
  if (name.starts_with("single_transformer_blocks"))
    return {image + text, name.ends_with(".proj_out") ? attention : 0};
  if (name == "context_embedder" || contains(name, "ff_context") || contains(name, ".add_"))
    return {text, 0};
  if (contains(name, "to_add_out")) return {text, 0};
  return {image, contains(name, "attn.to_out") ? attention : 0};
}

LayerLoad encoder_load(const std::string& name, const Workload& w, int64_t tokens, int64_t inner) {
  const bool after_attention = name.ends_with(".o") || name.ends_with("out_proj");
  const double all = static_cast<double>(w.batch * tokens);
  return {all, after_attention ? 4.0 * all * static_cast<double>(tokens * inner) : 0};
}

struct DecodeShape {
  int64_t latent_height, latent_width;  // of one tile
  double tiles;                         // of that size, as a number of operations
};

DecodeShape decode_shape(const AutoencoderKL& vae, const Workload& w) {
  const int64_t f = vae.scale_factor();
  int64_t height = (w.height + f - 1) / f, width = (w.width + f - 1) / f;
  const int64_t tile = vae.tile_latent_min_size();
  if (!w.tiled || (height <= tile && width <= tile)) return {height, width, 1};
  const auto step = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(tile) * 0.75));
  double pixels = 0;  // the last tiles of a row and column are cut
  for (int64_t i = 0; i < height; i += step) {
    for (int64_t j = 0; j < width; j += step)
      pixels += static_cast<double>(std::min(tile, height - i) * std::min(tile, width - j));
  }
  const int64_t tile_height = std::min(tile, height), tile_width = std::min(tile, width);
  return {tile_height, tile_width, pixels / static_cast<double>(tile_height * tile_width)};
}

LayerLoad decoder_load(const AutoencoderKL& vae, const std::string& name, const Workload& w) {
  if (!name.starts_with("decoder.") && name != "post_quant_conv") return {};
  const DecodeShape shape = decode_shape(vae, w);
  const size_t blocks = vae.config().block_out_channels.size();
  size_t doublings = 0;
  const std::string up = "decoder.up_blocks.";
  if (name.starts_with(up)) {
    doublings = static_cast<size_t>(std::stoul(name.substr(up.size())));
    if (contains(name, "upsamplers")) ++doublings;
  } else if (name == "decoder.conv_norm_out" || name == "decoder.conv_out") {
    doublings = blocks - 1;
  }
  const double latents = static_cast<double>(w.batch * shape.latent_height * shape.latent_width);
  const double rows = latents * std::pow(4.0, static_cast<double>(doublings)) * shape.tiles;
  double attention = 0;
  if (contains(name, "attentions.0.to_out")) {
    const double tokens = static_cast<double>(shape.latent_height * shape.latent_width);
    attention = 4.0 * latents * tokens * shape.tiles *
                static_cast<double>(vae.config().block_out_channels.back());
  }
  return {rows, attention};
}

LayerLoad load_of(const Model& model, const std::string& name, const Workload& w) {
  if (auto* flux = dynamic_cast<const FluxTransformer2DModel*>(&model))
    return flux_load(*flux, name, w);
  if (auto* t5 = dynamic_cast<const T5EncoderModel*>(&model))
    return encoder_load(name, w, w.text_tokens, t5->config().num_heads * t5->config().d_kv);
  if (auto* clip = dynamic_cast<const CLIPTextModel*>(&model)) {
    return encoder_load(name, w, clip->config().max_position_embeddings,
                        clip->config().hidden_size);
  }
  if (auto* clip = dynamic_cast<const CLIPTextModelWithProjection*>(&model)) {
    return encoder_load(name, w, clip->config().max_position_embeddings,
                        clip->config().hidden_size);
  }
  if (auto* vae = dynamic_cast<const AutoencoderKL*>(&model)) return decoder_load(*vae, name, w);
  return {static_cast<double>(w.batch * (flux_image_tokens(w) + w.text_tokens)), 0};
}

// ---- memory; in values, by counting what is alive in the forwards ----

// What the caller holds during a block, and the rotation's angles in float32.
double flux_held_outside(const FluxTransformer2DModel& model, const Workload& w) {
  const FluxTransformer2DConfig& c = model.config();
  const double image = static_cast<double>(w.batch * flux_image_tokens(w));
  const double text = static_cast<double>(w.batch * w.text_tokens);
  return text * static_cast<double>(c.joint_attention_dim) +
         image * static_cast<double>(c.in_channels) +
         (image + text) * static_cast<double>(c.attention_head_dim) * 2 * 4 /
             static_cast<double>(c10::elementSize(w.dtype));
}

double flux_values(const FluxTransformer2DModel& model, const Workload& w) {
  const double dim = static_cast<double>(model.config().inner_dim());
  const double image = static_cast<double>(w.batch * flux_image_tokens(w));
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
  return dim * std::max(widths * (image + text), twice) + flux_held_outside(model, w);
}

double encoder_values(const Workload& w, int64_t tokens, int64_t dim, int64_t ff, int64_t heads,
                      double wide) {
  const double rows = static_cast<double>(w.batch * tokens);
  // `wide`: tensors of the feed-forward's inner width at once; gelu's tanh form is a chain of
  // operations. Masks and position biases, also while they are added up.
  const double scores = 2.0 * static_cast<double>(heads * tokens * tokens);
  const double layer = rows * (5 * static_cast<double>(dim) + wide * static_cast<double>(ff));
  return scores + layer;
}

double decoder_values(const AutoencoderKL& vae, const Workload& w) {
  const DecodeShape shape = decode_shape(vae, w);
  double pixels = static_cast<double>(w.batch * shape.latent_height * shape.latent_width);
  const auto& channels = vae.config().block_out_channels;
  double most = 0, in = static_cast<double>(channels.back());
  for (size_t i = 0; i < channels.size(); ++i) {
    const double out = static_cast<double>(channels[channels.size() - 1 - i]);
    // A residual block: its input and what is normed and activated; then what a convolution reads
    // and writes, which the CPU's kernels do on reordered copies.
    const double convolution = w.on_cpu ? 2 : 1;
    double block = in + std::max(2 * in, convolution * (in + out));
    block = std::max(block, in + out + convolution * 2 * out);
    most = std::max(most, pixels * block);
    if (i + 1 == channels.size()) break;
    most = std::max(most, pixels * (in + out) + 4 * pixels * out * 2 * convolution);
    pixels *= 4;
    in = out;
  }
  // The picture, and in tiles two rows of them and the finished ones.
  const double picture =
      static_cast<double>(w.batch * w.height * w.width * vae.config().out_channels);
  // Each thread of a CPU has buffers of its own for narrow types.
  const bool narrow = w.on_cpu && c10::elementSize(w.dtype) < 4;
  return most * (narrow ? 1.08 : 1) + (w.tiled ? 4 : 2) * picture;
}

double values_of(const Model& model, const Workload& w) {
  if (auto* flux = dynamic_cast<const FluxTransformer2DModel*>(&model))
    return flux_values(*flux, w);
  if (auto* t5 = dynamic_cast<const T5EncoderModel*>(&model)) {
    const T5Config& c = t5->config();
    return encoder_values(w, w.text_tokens, std::max(c.d_model, c.num_heads * c.d_kv), c.d_ff,
                          c.num_heads, c.is_gated_act() ? 8 : 7);
  }
  auto clip = [&](const CLIPTextConfig& c) {
    return encoder_values(w, c.max_position_embeddings, c.hidden_size, c.intermediate_size,
                          c.num_attention_heads, 4);
  };
  if (auto* text = dynamic_cast<const CLIPTextModel*>(&model)) return clip(text->config());
  if (auto* text = dynamic_cast<const CLIPTextModelWithProjection*>(&model))
    return clip(text->config());
  if (auto* vae = dynamic_cast<const AutoencoderKL*>(&model)) return decoder_values(*vae, w);
  // Unknown: as many values a token as sixteen times the narrower side of the largest matrix.
  int64_t widest = 1, largest = 0;
  for (const weights::Slot& slot : weights::collect_slots(model)) {
    if (slot.shape().size() != 2 || slot.tensor.numel() <= largest) continue;
    largest = slot.tensor.numel();
    widest = std::min(slot.shape()[0], slot.shape()[1]);
  }
  return 16.0 * static_cast<double>(widest * w.batch * (flux_image_tokens(w) + w.text_tokens));
}

uint64_t to_bytes(double values, const Workload& workload) {
  constexpr double kOddsAndEnds = 1.02;  // embeddings of timesteps, gates, norms' statistics
  return static_cast<uint64_t>(kOddsAndEnds * values *
                               static_cast<double>(c10::elementSize(workload.dtype)));
}

}  // namespace

std::map<std::string, double> layer_flops(const Model& model, const Workload& workload) {
  std::map<std::string, double> flops;
  std::set<std::string> quantized;
  for (const auto& entry : model.named_modules("", /*include_self=*/false)) {
    const auto* linear = dynamic_cast<const nn::Linear*>(entry.value().get());
    if (!linear || !linear->quantized_weight()) continue;
    quantized.insert(entry.key());
    const LayerLoad load = load_of(model, entry.key(), workload);
    flops[entry.key()] =
        2.0 * load.rows * static_cast<double>(linear->in_features() * linear->out_features()) +
        load.attention_flops;
  }
  for (const weights::Slot& slot : weights::collect_slots(model)) {
    const size_t dot = slot.name().rfind('.');
    const std::string layer = dot == std::string::npos ? "" : slot.name().substr(0, dot);
    if (slot.shape().size() < 2 || quantized.contains(layer) || contains(layer, "embed_tokens") ||
        layer == "shared" || contains(layer, "position_embedding") ||
        contains(layer, "token_embedding") || contains(layer, "relative_attention_bias"))
      continue;  // vectors cost next to nothing, tables are looked up
    const LayerLoad load = load_of(model, layer, workload);
    flops[layer] +=
        2.0 * load.rows * static_cast<double>(slot.tensor.numel()) + load.attention_flops;
  }
  return flops;
}

uint64_t activation_bytes(const Model& model, const Workload& workload) {
  return to_bytes(values_of(model, workload), workload);
}

uint64_t held_bytes(const Model& model, const Workload& workload) {
  const auto* flux = dynamic_cast<const FluxTransformer2DModel*>(&model);
  if (!flux) return activation_bytes(model, workload);
  // A block's inputs, which its caller still has, and its outputs.
  const double tokens =
      static_cast<double>(workload.batch * (flux_image_tokens(workload) + workload.text_tokens));
  return to_bytes(2 * tokens * static_cast<double>(flux->config().inner_dim()) +
                      flux_held_outside(*flux, workload),
                  workload);
}

}  // namespace ferry::models
