// Text to image with Flux: diffusers' FluxPipeline (0.42.1, pipelines/flux/pipeline_flux.py).
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "ferry/pipelines/pipeline.h"

namespace ferry::pipelines {

// The arguments of FluxPipeline.__call__, under their names. `latents` are packed: [batch, tokens,
// channels]; the callback's tensors are "latents" and "prompt_embeds".
struct FluxPipelineArguments : CommonArguments {
  // Above 1 and with a negative prompt: a second pass over the transformer in every step.
  double true_cfg_scale = 1.0;
  // Pixels; rounded down to what the transformer's patches cover. Unset: 128 latents.
  std::optional<int64_t> height, width;
  int64_t num_inference_steps = 28;
  std::optional<std::vector<double>> sigmas;
  // Only for transformers with guidance embeddings (FLUX.1-dev).
  double guidance_scale = 3.5;
  int64_t max_sequence_length = 512;
  nlohmann::json joint_attention_kwargs = nlohmann::json::object();
};

// Components: scheduler, transformer, vae, and where prompts are text: text_encoder (CLIP),
// tokenizer, text_encoder_2 (T5), tokenizer_2.
class FluxPipeline : public DiffusionPipeline {
 public:
  FluxPipeline(std::map<std::string, Component> components, nlohmann::ordered_json config);

  std::string class_name() const override { return "FluxPipeline"; }
  PipelineOutput text_to_image(const TextToImageArguments& arguments) override;
  int64_t default_num_inference_steps() const override {
    return FluxPipelineArguments().num_inference_steps;
  }
  CallbackTensors encode_prompts(const TextToImageArguments& arguments) override;

  // Records no autograd graph. Throws ArgumentError (arguments that contradict each other), Error
  // (a picture with NaN), Cancelled, and what reading weights throws.
  PipelineOutput operator()(const FluxPipelineArguments& arguments);

  struct PromptEmbeds {
    at::Tensor prompt_embeds;         // [batch * num_images, tokens, joint_attention_dim]
    at::Tensor pooled_prompt_embeds;  // [batch * num_images, pooled_projection_dim]
    at::Tensor text_ids;              // [tokens, 3], zeros
  };
  // In the transformer's dtype. Pictures of one prompt lie beside each other.
  PromptEmbeds encode_prompt(const Texts& prompt, const Texts& prompt_2,
                             int64_t num_images_per_prompt = 1, int64_t max_sequence_length = 512);

  // Of the running generation.
  double guidance_scale() const { return guidance_scale_; }
  int64_t num_timesteps() const { return num_timesteps_; }
  const at::Tensor& current_timestep() const { return current_timestep_; }

  // Pixels a latent covers in each direction.
  int64_t vae_scale_factor() const { return vae_scale_factor_; }

  // [batch, channels, height, width] -> [batch, height/2 * width/2, channels * 4]
  static at::Tensor pack_latents(const at::Tensor& latents);
  // The inverse; height and width of the picture, in pixels.
  static at::Tensor unpack_latents(const at::Tensor& latents, int64_t height, int64_t width,
                                   int64_t vae_scale_factor);
  // [height * width, 3]: 0, row, column of each token.
  static at::Tensor latent_image_ids(int64_t height, int64_t width, at::ScalarType dtype,
                                     at::Device device);

 protected:
  std::vector<std::string> unused_modules(const std::string& component) const override;

 private:
  FluxPipelineArguments own_arguments(const TextToImageArguments& arguments) const;
  void check_inputs(const FluxPipelineArguments& arguments, int64_t height, int64_t width) const;
  void check_embeds(const at::Tensor& embeds, const at::Tensor& pooled, int64_t batch) const;
  struct Conditioning {
    PromptEmbeds positive;
    std::optional<PromptEmbeds> negative;  // with true CFG
  };
  // From texts or as given; `announce` is told which text encoders will run.
  Conditioning condition(const FluxPipelineArguments& arguments,
                         const std::function<void(const std::vector<std::string>&)>& announce);
  PromptEmbeds finish_embeds(const at::Tensor& embeds, const at::Tensor& pooled,
                             int64_t num_images_per_prompt) const;
  std::vector<PromptJob> prompt_jobs(const Texts& prompt, const Texts& prompt_2,
                                     int64_t max_sequence_length) const;
  at::Tensor run_encoder(const PromptJob& job);
  at::Tensor prepare_latents(const FluxPipelineArguments& arguments, int64_t batch, int64_t height,
                             int64_t width);
  void set_timesteps(const FluxPipelineArguments& arguments, int64_t image_tokens);
  // One step's prediction of the noise, for rows [begin, begin + count) of the batch.
  struct Step {
    at::Tensor latents, timestep, guidance, image_ids;
    const nlohmann::json& attention_kwargs;
  };
  at::Tensor predict(const Step& step, const PromptEmbeds& embeds, int64_t begin, int64_t count);
  // The same for the whole batch and for each conditioning, in as many passes as are set.
  std::vector<at::Tensor> predict_all(const Step& step,
                                      const std::vector<const PromptEmbeds*>& conditionings);
  at::Tensor decode(const at::Tensor& latents, int64_t height, int64_t width);

  int64_t vae_scale_factor_ = 8;
  double guidance_scale_ = 0;
  int64_t num_timesteps_ = 0;
  at::Tensor current_timestep_;
};

// The shift of the noise schedule for a picture of so many tokens.
double calculate_shift(int64_t image_seq_len, int64_t base_seq_len = 256,
                       int64_t max_seq_len = 4096, double base_shift = 0.5,
                       double max_shift = 1.15);

}  // namespace ferry::pipelines
