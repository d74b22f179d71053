#include <fmt/ranges.h>

#include <algorithm>
#include <set>
#include <unordered_map>

#include "ferry/base/error.h"
#include "ferry/models/single_file.h"

namespace ferry::models {

namespace {

using nlohmann::ordered_json;

// The shapes of a model's weights by parameter name.
class Shapes {
 public:
  Shapes(const quant::StoredWeights& weights, const std::string& where) : where_(where) {
    for (const weights::StoredTensor& tensor : weights.plain) shapes_[tensor.key] = tensor.shape;
    for (const auto& [name, quantized] : weights.quantized)
      shapes_[name] = quantized.weight->shape().vec();
  }

  bool has(const std::string& name) const { return shapes_.contains(name); }
  // One extent of a tensor of `dimensions` dimensions.
  int64_t extent(const std::string& name, size_t axis, size_t dimensions = 2) const {
    auto found = shapes_.find(name);
    if (found == shapes_.end()) throw_error<FormatError>("{}: '{}' is missing", where_, name);
    const std::vector<int64_t>& shape = found->second;
    if (shape.size() != dimensions || shape[axis] <= 0) {
      throw_error<FormatError>("{}: '{}' has the shape [{}], expected {} dimensions", where_, name,
                               fmt::join(shape, ", "), dimensions);
    }
    return shape[axis];
  }
  int64_t rows(const std::string& name) const { return extent(name, 0); }
  int64_t columns(const std::string& name) const { return extent(name, 1); }

  // How many numbers 0, 1, … there are at the place of "{}" in the names that begin with `prefix`.
  int64_t count(const std::string& prefix) const {
    std::set<std::string> numbers;
    for (const auto& [name, shape] : shapes_) {
      if (!name.starts_with(prefix)) continue;
      size_t end = name.find('.', prefix.size());
      if (end != std::string::npos) numbers.insert(name.substr(prefix.size(), end - prefix.size()));
    }
    return static_cast<int64_t>(numbers.size());
  }

  // `whole / part`, which must be whole.
  int64_t divided(const char* what, int64_t whole, int64_t part) const {
    if (whole % part != 0) {
      throw_error<FormatError>("{}: {}: {} is no multiple of {}", where_, what, whole, part);
    }
    return whole / part;
  }

 private:
  const std::string& where_;
  std::unordered_map<std::string, std::vector<int64_t>> shapes_;
};

ordered_json flux(const Shapes& shapes) {
  const int64_t inner_dim = shapes.rows("x_embedder.weight");
  const int64_t in_channels = shapes.columns("x_embedder.weight");
  const int64_t out_channels = shapes.rows("proj_out.weight");
  const int64_t head_dim = shapes.extent("transformer_blocks.0.attn.norm_q.weight", 0, 1);
  ordered_json config;
  config["_class_name"] = "FluxTransformer2DModel";
  config["patch_size"] = 1;
  config["in_channels"] = in_channels;
  // FLUX.1-Fill has more channels in than out.
  config["out_channels"] =
      out_channels == in_channels ? ordered_json(nullptr) : ordered_json(out_channels);
  config["num_layers"] = shapes.count("transformer_blocks.");
  config["num_single_layers"] = shapes.count("single_transformer_blocks.");
  config["attention_head_dim"] = head_dim;
  config["num_attention_heads"] = shapes.divided("num_attention_heads", inner_dim, head_dim);
  config["joint_attention_dim"] = shapes.columns("context_embedder.weight");
  config["pooled_projection_dim"] = shapes.columns("time_text_embed.text_embedder.linear_1.weight");
  config["guidance_embeds"] = shapes.has("time_text_embed.guidance_embedder.linear_1.weight");
  config["axes_dims_rope"] = {16, 56, 56};
  return config;
}

ordered_json autoencoder(const Shapes& shapes) {
  const int64_t blocks = shapes.count("encoder.down_blocks.");
  const int64_t latent_channels = shapes.extent("decoder.conv_in.weight", 1, 4);
  std::vector<int64_t> channels;
  for (int64_t i = 0; i < blocks; ++i) {
    channels.push_back(
        shapes.extent(fmt::format("encoder.down_blocks.{}.resnets.0.conv1.weight", i), 0, 4));
  }
  // Sixteen channels: FLUX.1's; four: Stable Diffusion's.
  const bool is_flux = latent_channels == 16;
  ordered_json config;
  config["_class_name"] = "AutoencoderKL";
  config["in_channels"] = shapes.extent("encoder.conv_in.weight", 1, 4);
  config["out_channels"] = shapes.extent("decoder.conv_out.weight", 0, 4);
  config["down_block_types"] = std::vector<std::string>(blocks, "DownEncoderBlock2D");
  config["up_block_types"] = std::vector<std::string>(blocks, "UpDecoderBlock2D");
  config["block_out_channels"] = channels;
  config["layers_per_block"] = shapes.count("encoder.down_blocks.0.resnets.");
  config["act_fn"] = "silu";
  config["latent_channels"] = latent_channels;
  config["norm_num_groups"] = 32;
  config["sample_size"] = is_flux ? 1024 : 512;
  config["scaling_factor"] = is_flux ? 0.3611 : 0.18215;
  config["shift_factor"] = is_flux ? ordered_json(0.1159) : ordered_json(nullptr);
  config["latents_mean"] = nullptr;
  config["latents_std"] = nullptr;
  config["force_upcast"] = true;
  config["use_quant_conv"] = shapes.has("quant_conv.weight");
  config["use_post_quant_conv"] = shapes.has("post_quant_conv.weight");
  config["mid_block_add_attention"] = shapes.has("encoder.mid_block.attentions.0.to_q.weight") ||
                                      shapes.has("encoder.mid_block.attentions.0.query.weight");
  return config;
}

ordered_json t5(const Shapes& shapes, const io::GgufMetadata& gguf) {
  const std::string block = "encoder.block.0.layer.";
  const std::string bias = block + "0.SelfAttention.relative_attention_bias.weight";
  const bool is_gated = shapes.has(block + "1.DenseReluDense.wi_0.weight");
  const std::string table =
      shapes.has("shared.weight") ? "shared.weight" : "encoder.embed_tokens.weight";
  const int64_t heads = shapes.columns(bias);
  ordered_json config;
  config["architectures"] = {"T5EncoderModel"};
  config["vocab_size"] = shapes.rows(table);
  config["d_model"] = shapes.columns(table);
  config["d_kv"] = shapes.divided("d_kv", shapes.rows(block + "0.SelfAttention.q.weight"), heads);
  config["d_ff"] = shapes.rows(
      block + (is_gated ? "1.DenseReluDense.wi_0.weight" : "1.DenseReluDense.wi.weight"));
  config["num_layers"] = shapes.count("encoder.block.");
  config["num_heads"] = heads;
  config["relative_attention_num_buckets"] = shapes.rows(bias);
  config["relative_attention_max_distance"] = 128;
  config["feed_forward_proj"] = is_gated ? "gated-gelu" : "relu";
  const io::GgufValue* epsilon = io::find_value(gguf, "t5encoder.attention.layer_norm_rms_epsilon");
  if (!epsilon) epsilon = io::find_value(gguf, "t5.attention.layer_norm_rms_epsilon");
  const auto* value = epsilon ? std::get_if<double>(&epsilon->data) : nullptr;
  // A float32 in the file: 1e-6 there is another double.
  config["layer_norm_epsilon"] =
      value ? std::stod(fmt::format("{}", static_cast<float>(*value))) : 1e-6;
  return config;
}

ordered_json clip(const std::string& class_name, const Shapes& shapes) {
  const std::string prefix =
      shapes.has("text_model.embeddings.token_embedding.weight") ? "text_model." : "";
  const std::string table = prefix + "embeddings.token_embedding.weight";
  const int64_t hidden_size = shapes.columns(table);
  ordered_json config;
  config["architectures"] = {class_name};
  config["vocab_size"] = shapes.rows(table);
  config["hidden_size"] = hidden_size;
  config["intermediate_size"] = shapes.rows(prefix + "encoder.layers.0.mlp.fc1.weight");
  config["projection_dim"] =
      shapes.has("text_projection.weight") ? shapes.rows("text_projection.weight") : hidden_size;
  config["num_hidden_layers"] = shapes.count(prefix + "encoder.layers.");
  // Heads are of 64 channels in every published CLIP.
  config["num_attention_heads"] = std::max<int64_t>(1, hidden_size / 64);
  config["max_position_embeddings"] = shapes.rows(prefix + "embeddings.position_embedding.weight");
  // OpenAI's (L: 768) has quick_gelu, OpenCLIP's (H: 1024, bigG: 1280) gelu.
  config["hidden_act"] = hidden_size >= 1024 ? "gelu" : "quick_gelu";
  config["layer_norm_eps"] = 1e-5;
  config["pad_token_id"] = 1;
  config["bos_token_id"] = 0;
  // As in the published config.json: the pooled output is at the highest id.
  config["eos_token_id"] = 2;
  return config;
}

}  // namespace

nlohmann::ordered_json config_by_shapes(const std::string& class_name,
                                        const quant::StoredWeights& weights,
                                        const io::GgufMetadata& gguf, const std::string& where) {
  const Shapes shapes(weights, where);
  if (class_name == "FluxTransformer2DModel") return flux(shapes);
  if (class_name == "AutoencoderKL") return autoencoder(shapes);
  if (class_name == "T5EncoderModel") return t5(shapes, gguf);
  if (class_name == "CLIPTextModel" || class_name == "CLIPTextModelWithProjection")
    return clip(class_name, shapes);
  throw_error<ArgumentError>("{}: ferry has no built-in config for '{}'", where, class_name);
}

}  // namespace ferry::models
