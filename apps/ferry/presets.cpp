#include "presets.h"

#include "ferry/base/error.h"

namespace ferry::cli {

namespace {

constexpr const char* kFluxVae =
    R"({"act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
        "force_upcast": true, "in_channels": 3, "latent_channels": 16, "latents_mean": null, "latents_std": null,
        "layers_per_block": 2, "mid_block_add_attention": true, "norm_num_groups": 32, "out_channels": 3,
        "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159,
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
        "use_post_quant_conv": false, "use_quant_conv": false})";

// Component name, preset.
std::vector<std::pair<std::string, std::string>> parts_of(const std::string& preset) {
  const bool tiny = preset.ends_with("-tiny");
  const std::string suffix = tiny ? "-tiny" : "";
  const std::string base = preset.substr(0, preset.size() - suffix.size());
  if (base == "flux-dev" || base == "flux-schnell") {
    return {{"text_encoder", "clip-l" + suffix},
            {"text_encoder_2", "t5-xxl" + suffix},
            {"transformer", preset},
            {"vae", "flux-vae" + suffix}};
  }
  return {{"", preset}};
}

}  // namespace

const std::vector<Preset>& presets() {
  static const std::vector<Preset> table = {
      {"flux-dev", "FluxTransformer2DModel",
       R"({"attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "guidance_embeds": true, "in_channels": 64,
           "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38,
           "out_channels": null, "patch_size": 1, "pooled_projection_dim": 768})",
       0},
      {"flux-schnell", "FluxTransformer2DModel",
       R"({"attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "guidance_embeds": false, "in_channels": 64,
           "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38,
           "out_channels": null, "patch_size": 1, "pooled_projection_dim": 768})",
       0},
      {"flux-2gb", "FluxTransformer2DModel",
       R"({"attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "guidance_embeds": false, "in_channels": 64,
           "joint_attention_dim": 4096, "num_attention_heads": 15, "num_layers": 4, "num_single_layers": 8,
           "out_channels": null, "patch_size": 1, "pooled_projection_dim": 768})",
       500'000'000},
      {"t5-xxl", "T5EncoderModel",
       R"({"classifier_dropout": 0.0, "d_ff": 10240, "d_kv": 64, "d_model": 4096, "decoder_start_token_id": 0,
           "dense_act_fn": "gelu_new", "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
           "initializer_factor": 1.0, "is_encoder_decoder": true, "is_gated_act": true, "layer_norm_epsilon": 1e-06,
           "model_type": "t5", "num_decoder_layers": 24, "num_heads": 64, "num_layers": 24, "output_past": true,
           "pad_token_id": 0, "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
           "tie_word_embeddings": false, "use_cache": true, "vocab_size": 32128})",
       5'000'000'000},
      {"clip-l", "CLIPTextModel",
       R"({"attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu",
           "hidden_size": 768, "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072,
           "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model",
           "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768,
           "vocab_size": 49408})",
       0},
      {"flux-vae", "AutoencoderKL", kFluxVae, 0},
      {"flux-dev-tiny", "FluxTransformer2DModel",
       R"({"attention_head_dim": 16, "axes_dims_rope": [4, 6, 6], "guidance_embeds": true, "in_channels": 16,
           "joint_attention_dim": 32, "num_attention_heads": 2, "num_layers": 2, "num_single_layers": 2,
           "out_channels": null, "patch_size": 1, "pooled_projection_dim": 32})",
       0},
      {"flux-schnell-tiny", "FluxTransformer2DModel",
       R"({"attention_head_dim": 16, "axes_dims_rope": [4, 6, 6], "guidance_embeds": false, "in_channels": 16,
           "joint_attention_dim": 32, "num_attention_heads": 2, "num_layers": 2, "num_single_layers": 2,
           "out_channels": null, "patch_size": 1, "pooled_projection_dim": 32})",
       0},
      {"t5-xxl-tiny", "T5EncoderModel",
       R"({"d_ff": 64, "d_kv": 16, "d_model": 32, "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-06,
           "model_type": "t5", "num_heads": 2, "num_layers": 2, "pad_token_id": 0, "vocab_size": 1000})",
       0},
      {"clip-l-tiny", "CLIPTextModel",
       R"({"bos_token_id": 0, "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 32,
           "intermediate_size": 64, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
           "model_type": "clip_text_model", "num_attention_heads": 2, "num_hidden_layers": 2, "pad_token_id": 1,
           "projection_dim": 32, "vocab_size": 1000})",
       0},
      {"flux-vae-tiny", "AutoencoderKL",
       R"({"block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
           "force_upcast": true, "in_channels": 3, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
           "out_channels": 3, "sample_size": 32, "scaling_factor": 0.3611, "shift_factor": 0.1159,
           "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"], "use_post_quant_conv": false,
           "use_quant_conv": false})",
       0},
  };
  return table;
}

const Preset* find_preset(const std::string& name) {
  for (const Preset& preset : presets()) {
    if (preset.name == name) return &preset;
  }
  return nullptr;
}

std::string preset_names() {
  std::string names;
  for (const Preset& preset : presets())
    names += (names.empty() ? "" : ", ") + std::string(preset.name);
  return names;
}

std::vector<pipelines::PlannedComponent> components_of_preset(
    const std::string& preset, const pipelines::PlanRequest& request) {
  std::vector<pipelines::PlannedComponent> components;
  for (const auto& [name, part] : parts_of(preset)) {
    const Preset* found = find_preset(part);
    if (!found)
      throw_error<ArgumentError>("--preset {}: unknown; presets: {}", preset, preset_names());
    auto model = models::make_model(found->class_name, nlohmann::ordered_json::parse(found->config),
                                    found->name);
    components.push_back(
        pipelines::describe_component(name, std::move(model), at::kBFloat16, request));
  }
  return components;
}

}  // namespace ferry::cli
