#include "ferry/pipelines/flux/pipeline_flux.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <memory>
#include <span>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/models/autoencoders/autoencoder.h"
#include "ferry/models/config.h"
#include "ferry/pipelines/stop_hook.h"

namespace ferry::pipelines {
namespace {

constexpr int64_t kDefaultSampleSize = 128;

// A value of a component's config; `fallback` where it is absent or null.
template <class T>
T value_of(const nlohmann::ordered_json& config, const char* key, T fallback) {
  return models::config_value(config, key, fallback, "a component's config");
}

// What a model returned under `name`.
at::Tensor output_of(models::Model& model, const std::string& method,
                     const models::NamedTensors& inputs, const char* name,
                     const nlohmann::json& arguments = nlohmann::json::object()) {
  models::NamedTensors outputs = model.forward_named(method, inputs, arguments);
  auto it = outputs.find(name);
  if (it == outputs.end())
    throw_error<Error>("{}: {} gave no output \"{}\"", model.class_name(), method, name);
  return it->second;
}

// The first row `count` times, then the second `count` times, …
at::Tensor repeat_rows(const at::Tensor& tensor, int64_t count) {
  return count == 1 ? tensor : tensor.repeat_interleave(count, 0);
}

// One text stands for all of a batch.
Texts broadcast(const Texts& texts, size_t batch, const char* what) {
  if (texts.size() == batch) return texts;
  if (texts.size() == 1) return Texts(std::vector<std::string>(batch, texts.front()));
  throw_error<ArgumentError>("`{}` has {} texts, expected 1 or one for each of the {} prompts",
                             what, texts.size(), batch);
}

// Token ids [batch, max_length], padded. Tells what was cut off, as diffusers does.
at::Tensor tokenize(const text::Tokenizer& tokenizer, const Texts& texts, int64_t max_length,
                    const char* limit) {
  auto padded = tokenizer.encode(
      std::span<const std::string>(texts),
      {.max_length = max_length, .padding = text::Padding::max_length, .truncation = true});
  at::Tensor ids = at::empty({static_cast<int64_t>(texts.size()), max_length}, at::kLong);
  for (size_t i = 0; i < texts.size(); ++i) {
    std::copy(padded[i].ids.begin(), padded[i].ids.end(),
              ids.mutable_data_ptr<int64_t>() + static_cast<int64_t>(i) * max_length);
    std::vector<int64_t> whole = tokenizer.encode(texts[i]).ids;
    if (static_cast<int64_t>(whole.size()) <= max_length) continue;
    std::span<const int64_t> removed(whole);
    removed = removed.subspan(max_length - 1, removed.size() - max_length);
    log::warn("the following part of the prompt was cut off because {} {} tokens: \"{}\"", limit,
              max_length, tokenizer.decode(removed, /*skip_special_tokens=*/true));
  }
  return ids;
}

bool uses_true_cfg(const FluxPipelineArguments& a) {
  const bool has_negative =
      a.negative_prompt || (a.negative_prompt_embeds && a.negative_pooled_prompt_embeds);
  return a.true_cfg_scale > 1 && has_negative;
}

std::vector<std::unique_ptr<StopHooks>> stop_everywhere(const DiffusionPipeline& pipeline,
                                                        const StopToken& stop) {
  std::vector<std::unique_ptr<StopHooks>> hooks;
  for (const auto& [name, component] : pipeline.components()) {
    if (component.model) hooks.push_back(std::make_unique<StopHooks>(*component.model, stop));
  }
  return hooks;
}

}  // namespace

double calculate_shift(int64_t image_seq_len, int64_t base_seq_len, int64_t max_seq_len,
                       double base_shift, double max_shift) {
  double m = (max_shift - base_shift) / static_cast<double>(max_seq_len - base_seq_len);
  double b = base_shift - m * static_cast<double>(base_seq_len);
  return static_cast<double>(image_seq_len) * m + b;
}

FluxPipeline::FluxPipeline(std::map<std::string, Component> components,
                           nlohmann::ordered_json config)
    : DiffusionPipeline(std::move(components), std::move(config)) {
  if (has("vae")) {
    auto* vae = dynamic_cast<models::AutoencoderMixin*>(&model("vae"));
    if (!vae) {
      throw_error<ArgumentError>(
          "FluxPipeline: the component \"vae\" is a {}, expected an autoencoder",
          model("vae").class_name());
    }
    vae_scale_factor_ = vae->scale_factor();
  }
}

at::Tensor FluxPipeline::pack_latents(const at::Tensor& latents) {
  int64_t batch = latents.size(0), channels = latents.size(1), height = latents.size(2),
          width = latents.size(3);
  return latents.view({batch, channels, height / 2, 2, width / 2, 2})
      .permute({0, 2, 4, 1, 3, 5})
      .reshape({batch, (height / 2) * (width / 2), channels * 4});
}

at::Tensor FluxPipeline::unpack_latents(const at::Tensor& latents, int64_t height, int64_t width,
                                        int64_t vae_scale_factor) {
  int64_t batch = latents.size(0), channels = latents.size(2);
  int64_t rows = height / (vae_scale_factor * 2), columns = width / (vae_scale_factor * 2);
  return latents.view({batch, rows, columns, channels / 4, 2, 2})
      .permute({0, 3, 1, 4, 2, 5})
      .reshape({batch, channels / 4, rows * 2, columns * 2});
}

at::Tensor FluxPipeline::latent_image_ids(int64_t height, int64_t width, at::ScalarType dtype,
                                          at::Device device) {
  at::Tensor ids = at::zeros({height, width, 3});
  ids.select(2, 1).add_(at::arange(height, at::kFloat).unsqueeze(1));
  ids.select(2, 2).add_(at::arange(width, at::kFloat).unsqueeze(0));
  return ids.reshape({height * width, 3}).to(device, dtype);
}

void FluxPipeline::check_inputs(const FluxPipelineArguments& a, int64_t height,
                                int64_t width) const {
  int64_t multiple = vae_scale_factor_ * 2;
  if (height < multiple || width < multiple) {
    throw_error<ArgumentError>("`height` {} and `width` {}: expected at least {} each", height,
                               width, multiple);
  }
  if (height % multiple != 0 || width % multiple != 0) {
    log::warn(
        "`height` and `width` have to be divisible by {} but are {} and {}; the picture becomes "
        "{}x{}",
        multiple, height, width, width / multiple * multiple, height / multiple * multiple);
  }
  for (const std::string& name : a.callback_on_step_end_tensor_inputs) {
    if (name != "latents" && name != "prompt_embeds") {
      throw_error<ArgumentError>(
          "`callback_on_step_end_tensor_inputs`: {}: expected \"latents\" or \"prompt_embeds\"",
          name);
    }
  }
  if (!a.prompt.empty() && a.prompt_embeds) {
    throw_error<ArgumentError>("give only one of `prompt` and `prompt_embeds`");
  }
  if (a.prompt_2 && a.prompt_embeds)
    throw_error<ArgumentError>("give only one of `prompt_2` and `prompt_embeds`");
  if (a.prompt.empty() && !a.prompt_embeds)
    throw_error<ArgumentError>("give either `prompt` or `prompt_embeds`");
  if (a.negative_prompt && a.negative_prompt_embeds) {
    throw_error<ArgumentError>("give only one of `negative_prompt` and `negative_prompt_embeds`");
  }
  if (a.negative_prompt_2 && a.negative_prompt_embeds) {
    throw_error<ArgumentError>("give only one of `negative_prompt_2` and `negative_prompt_embeds`");
  }
  if (a.prompt_embeds && !a.pooled_prompt_embeds) {
    throw_error<ArgumentError>(
        "`prompt_embeds` also need `pooled_prompt_embeds`, made by the same text encoders");
  }
  if (a.negative_prompt_embeds && !a.negative_pooled_prompt_embeds) {
    throw_error<ArgumentError>(
        "`negative_prompt_embeds` also need `negative_pooled_prompt_embeds`");
  }
  if (uses_true_cfg(a) && a.prompt_embeds && a.negative_prompt_embeds &&
      a.prompt_embeds->sizes() != a.negative_prompt_embeds->sizes()) {
    throw_error<ArgumentError>(
        "`prompt_embeds` [{}] and `negative_prompt_embeds` [{}] must have the same shape",
        fmt::join(a.prompt_embeds->sizes(), ", "),
        fmt::join(a.negative_prompt_embeds->sizes(), ", "));
  }
  if (a.max_sequence_length < 1 || a.max_sequence_length > 512) {
    throw_error<ArgumentError>("`max_sequence_length` {}: expected 1 to 512",
                               a.max_sequence_length);
  }
  if (a.num_inference_steps < 1) {
    throw_error<ArgumentError>("`num_inference_steps` {}: expected 1 or more",
                               a.num_inference_steps);
  }
  if (a.num_images_per_prompt < 1) {
    throw_error<ArgumentError>("`num_images_per_prompt` {}: expected 1 or more",
                               a.num_images_per_prompt);
  }
}

std::vector<FluxPipeline::PromptJob> FluxPipeline::prompt_jobs(const Texts& prompt,
                                                               const Texts& prompt_2,
                                                               int64_t max_sequence_length) const {
  // A tokenizer that names no limit is bound by the encoder's positions.
  const int64_t clip_length = std::min(
      tokenizer("tokenizer").model_max_length(),
      value_of<int64_t>(model("text_encoder").config_json(), "max_position_embeddings", 77));
  return {{"text_encoder", prompt, clip_length}, {"text_encoder_2", prompt_2, max_sequence_length}};
}

at::Tensor FluxPipeline::run_encoder(const PromptJob& job) {
  models::Model& encoder = model(job.encoder);
  const bool clip = job.encoder == "text_encoder";
  at::Tensor ids =
      tokenize(tokenizer(clip ? "tokenizer" : "tokenizer_2"), job.texts, job.max_length,
               clip ? "CLIP takes at most" : "max_sequence_length is set to");
  return output_of(encoder, "forward", {{"input_ids", ids.to(encoder.device())}},
                   clip ? "pooler_output" : "last_hidden_state")
      .to(encoder.dtype());
}

FluxPipeline::PromptEmbeds FluxPipeline::finish_embeds(const at::Tensor& embeds,
                                                       const at::Tensor& pooled,
                                                       int64_t num_images_per_prompt) const {
  models::Model& transformer = model("transformer");
  auto options = at::TensorOptions().dtype(transformer.dtype()).device(transformer.device());
  return {repeat_rows(embeds.to(options), num_images_per_prompt),
          repeat_rows(pooled.to(options), num_images_per_prompt),
          at::zeros({embeds.size(1), 3}, options)};
}

FluxPipeline::PromptEmbeds FluxPipeline::encode_prompt(const Texts& prompt, const Texts& prompt_2,
                                                       int64_t num_images_per_prompt,
                                                       int64_t max_sequence_length) {
  at::NoGradGuard no_grad;
  std::vector<PromptJob> jobs = prompt_jobs(prompt, prompt_2, max_sequence_length);
  recall(jobs);
  encode(jobs, [this](const PromptJob& job) { return run_encoder(job); });
  return finish_embeds(jobs[1].output, jobs[0].output, num_images_per_prompt);
}

void FluxPipeline::check_embeds(const at::Tensor& embeds, const at::Tensor& pooled,
                                int64_t batch) const {
  const nlohmann::ordered_json config = model("transformer").config_json();
  const auto channels = value_of<int64_t>(config, "joint_attention_dim", 4096);
  const auto pooled_channels = value_of<int64_t>(config, "pooled_projection_dim", 768);
  const bool fits = embeds.dim() == 3 && pooled.dim() == 2 && embeds.size(0) == pooled.size(0) &&
                    embeds.size(2) == channels && pooled.size(1) == pooled_channels;
  if (!fits) {
    throw_error<ArgumentError>(
        "prompt embeddings: got [{}] and pooled [{}], expected [batch, tokens, {}] and [batch, "
        "{}]; "
        "were they made by the text encoders of another model?",
        fmt::join(embeds.sizes(), ", "), fmt::join(pooled.sizes(), ", "), channels,
        pooled_channels);
  }
  if (embeds.size(0) != batch) {
    throw_error<ArgumentError>("prompt embeddings for {} pictures, expected {}", embeds.size(0),
                               batch);
  }
}

// Given embeddings are repeated for the pictures of a prompt, where diffusers would fail.
FluxPipeline::Conditioning FluxPipeline::condition(
    const FluxPipelineArguments& a,
    const std::function<void(const std::vector<std::string>&)>& announce) {
  const auto batch = static_cast<int64_t>(a.prompt_embeds ? a.prompt_embeds->size(0)
                                                          : static_cast<int64_t>(a.prompt.size()));
  const bool negative = uses_true_cfg(a);
  std::vector<PromptJob> jobs;
  auto add_jobs = [&](const Texts& prompt, const std::optional<Texts>& prompt_2) {
    const Texts first = broadcast(prompt, batch, "prompt");
    const Texts second = prompt_2 ? broadcast(*prompt_2, batch, "prompt_2") : first;
    for (PromptJob& job : prompt_jobs(first, second, a.max_sequence_length))
      jobs.push_back(std::move(job));
  };
  if (a.prompt_embeds) {
    check_embeds(*a.prompt_embeds, *a.pooled_prompt_embeds, batch);
  } else {
    add_jobs(a.prompt, a.prompt_2);
  }
  if (negative && a.negative_prompt_embeds) {
    check_embeds(*a.negative_prompt_embeds, *a.negative_pooled_prompt_embeds, batch);
  } else if (negative) {
    add_jobs(*a.negative_prompt, a.negative_prompt_2);
  }
  recall(jobs);
  std::vector<std::string> encoders;
  for (const char* encoder : {"text_encoder", "text_encoder_2"}) {
    if (std::any_of(jobs.begin(), jobs.end(), [&](const PromptJob& job) {
          return job.encoder == encoder && !job.output.defined();
        }))
      encoders.emplace_back(encoder);
  }
  announce(encoders);
  encode(jobs, [this](const PromptJob& job) { return run_encoder(job); });

  const PromptJob* made = jobs.data();
  auto embeds = [&](const std::optional<at::Tensor>& given,
                    const std::optional<at::Tensor>& given_pooled) {
    if (given) return finish_embeds(*given, *given_pooled, a.num_images_per_prompt);
    made += 2;
    return finish_embeds(made[-1].output, made[-2].output, a.num_images_per_prompt);
  };
  Conditioning conditioning{embeds(a.prompt_embeds, a.pooled_prompt_embeds), std::nullopt};
  if (negative)
    conditioning.negative = embeds(a.negative_prompt_embeds, a.negative_pooled_prompt_embeds);
  return conditioning;
}

at::Tensor FluxPipeline::prepare_latents(const FluxPipelineArguments& a, int64_t batch,
                                         int64_t height, int64_t width) {
  models::Model& transformer = model("transformer");
  int64_t channels = value_of<int64_t>(transformer.config_json(), "in_channels", 64) / 4;
  int64_t rows = 2 * (height / (vae_scale_factor_ * 2)),
          columns = 2 * (width / (vae_scale_factor_ * 2));
  if (a.latents) {
    std::vector<int64_t> expected = {batch, rows / 2 * (columns / 2), channels * 4};
    if (a.latents->sizes() != at::IntArrayRef(expected)) {
      throw_error<ArgumentError>("`latents`: got [{}], expected packed [{}]",
                                 fmt::join(a.latents->sizes(), ", "), fmt::join(expected, ", "));
    }
    return a.latents->to(transformer.device(), transformer.dtype());
  }
  if (a.generator.size() > 1 && static_cast<int64_t>(a.generator.size()) != batch) {
    throw_error<ArgumentError>(
        "{} generators for a batch of {} pictures; give one, or one for each", a.generator.size(),
        batch);
  }
  return pack_latents(tensor::randn_tensor({batch, channels, rows, columns}, a.generator,
                                           transformer.dtype(), transformer.device()));
}

void FluxPipeline::set_timesteps(const FluxPipelineArguments& a, int64_t image_tokens) {
  schedulers::Scheduler& scheduler = this->scheduler();
  nlohmann::ordered_json config = scheduler.config_json();
  schedulers::TimestepArguments timesteps;
  timesteps.device = model("transformer").device();
  if (value_of(config, "use_flow_sigmas", false)) {
    timesteps.num_inference_steps = a.num_inference_steps;
  } else if (a.sigmas) {
    timesteps.sigmas = a.sigmas;
  } else {
    // numpy.linspace(1.0, 1 / n, n)
    int64_t n = a.num_inference_steps;
    double end = 1.0 / static_cast<double>(n),
           step = n > 1 ? (end - 1.0) / static_cast<double>(n - 1) : 0;
    std::vector<double> sigmas(n);
    for (int64_t i = 0; i < n; ++i) sigmas[i] = static_cast<double>(i) * step + 1.0;
    if (n > 1) sigmas[n - 1] = end;
    timesteps.sigmas = sigmas;
  }
  timesteps.mu =
      calculate_shift(image_tokens, value_of<int64_t>(config, "base_image_seq_len", 256),
                      value_of<int64_t>(config, "max_image_seq_len", 4096),
                      value_of(config, "base_shift", 0.5), value_of(config, "max_shift", 1.15));
  scheduler.set_timesteps(timesteps);
  scheduler.set_begin_index(0);
  num_timesteps_ = scheduler.timesteps().numel();
}

at::Tensor FluxPipeline::predict(const Step& step, const PromptEmbeds& embeds, int64_t begin,
                                 int64_t count) {
  auto rows = [&](const at::Tensor& tensor) {
    return tensor.size(0) == count ? tensor : tensor.narrow(0, begin, count);
  };
  models::NamedTensors inputs = {{"hidden_states", rows(step.latents)},
                                 {"timestep", rows(step.timestep) / 1000},
                                 {"pooled_projections", rows(embeds.pooled_prompt_embeds)},
                                 {"encoder_hidden_states", rows(embeds.prompt_embeds)},
                                 {"txt_ids", embeds.text_ids},
                                 {"img_ids", step.image_ids}};
  if (step.guidance.defined()) inputs["guidance"] = rows(step.guidance);
  nlohmann::json arguments = nlohmann::json::object();
  if (!step.attention_kwargs.empty()) arguments["joint_attention_kwargs"] = step.attention_kwargs;
  return output_of(model("transformer"), "forward", inputs, "sample", arguments);
}

std::vector<at::Tensor> FluxPipeline::predict_all(
    const Step& step, const std::vector<const PromptEmbeds*>& conditionings) {
  const int64_t batch = step.latents.size(0);
  const int64_t count = pictures_per_pass() > 0 ? std::min(pictures_per_pass(), batch) : batch;
  std::vector<std::vector<at::Tensor>> parts(conditionings.size());
  std::vector<std::function<void()>> passes;
  for (size_t i = 0; i < conditionings.size(); ++i) {
    parts[i].resize((batch + count - 1) / count);
    for (size_t j = 0; j < parts[i].size(); ++j) {
      passes.emplace_back([&, i, j] {
        const int64_t begin = static_cast<int64_t>(j) * count;
        parts[i][j] = predict(step, *conditionings[i], begin, std::min(count, batch - begin));
      });
    }
  }
  run_together("transformer", std::move(passes), lockstep_turn());
  std::vector<at::Tensor> predictions;
  for (const std::vector<at::Tensor>& part : parts)
    predictions.push_back(part.size() == 1 ? part.front() : at::cat(part));
  return predictions;
}

at::Tensor FluxPipeline::decode(const at::Tensor& latents, int64_t height, int64_t width) {
  models::Model& vae = model("vae");
  nlohmann::ordered_json config = vae.config_json();
  at::Tensor z = unpack_latents(latents, height, width, vae_scale_factor_);
  z = z / value_of(config, "scaling_factor", 0.18215) + value_of(config, "shift_factor", 0.0);
  at::Tensor pictures;
  run_together(
      "vae", {[&] {
        pictures = output_of(vae, "decode", {{"z", z.to(vae.device(), vae.dtype())}}, "sample");
      }});
  return pictures;
}

std::vector<std::string> FluxPipeline::unused_modules(const std::string& component) const {
  if (component == "vae") return model("vae").unused_modules("decode", {});
  return {};
}

PipelineOutput FluxPipeline::operator()(const FluxPipelineArguments& a) {
  at::NoGradGuard no_grad;
  int64_t height = a.height.value_or(kDefaultSampleSize * vae_scale_factor_);
  int64_t width = a.width.value_or(kDefaultSampleSize * vae_scale_factor_);
  check_inputs(a, height, width);
  guidance_scale_ = a.guidance_scale;
  set_interrupt(false);
  auto tell = [&](const char* stage, int64_t step, int64_t total) {
    a.stop.throw_if_stopped();
    if (a.progress) a.progress({stage, step, total});
  };
  const auto stop_hooks = stop_everywhere(*this, a.stop);

  tell("encode", 0, 1);
  // The number of steps is certain only after set_timesteps(); for now it says what comes next.
  const int64_t decodes = a.output_type == OutputType::latent ? 0 : 1;
  auto [embeds, negative] = condition(a, [&](const std::vector<std::string>& encoders) {
    std::vector<std::pair<std::string, int64_t>> next;
    for (const std::string& encoder : encoders) next.emplace_back(encoder, 1);
    next.emplace_back("transformer", a.num_inference_steps);
    next.emplace_back("vae", decodes);
    announce(next);
  });
  tell("encode", 1, 1);

  const int64_t batch = embeds.prompt_embeds.size(0);
  at::Tensor latents = prepare_latents(a, batch, height, width);
  at::Tensor image_ids =
      latent_image_ids(height / (vae_scale_factor_ * 2), width / (vae_scale_factor_ * 2),
                       latents.scalar_type(), latents.device());
  set_timesteps(a, latents.size(1));
  at::Tensor guidance;
  if (value_of(model("transformer").config_json(), "guidance_embeds", false)) {
    guidance = at::full({1}, a.guidance_scale,
                        at::TensorOptions().dtype(at::kFloat).device(latents.device()))
                   .expand({batch});
  }

  schedulers::Scheduler& scheduler = this->scheduler();
  schedulers::StepArguments step_arguments;
  announce({{"transformer", num_timesteps_}, {"vae", decodes}});
  tell("denoise", 0, num_timesteps_);
  for (int64_t i = 0; i < num_timesteps_; ++i) {
    if (interrupt()) continue;
    at::Tensor t = scheduler.timesteps()[i];
    current_timestep_ = t;
    at::Tensor timestep = t.expand({batch}).to(latents.scalar_type());
    std::vector<const PromptEmbeds*> conditionings = {&embeds};
    if (negative) conditionings.push_back(&*negative);
    std::vector<at::Tensor> predictions = predict_all(
        {latents, timestep, guidance, image_ids, a.joint_attention_kwargs}, conditionings);
    at::Tensor noise = predictions[0];
    if (negative) noise = predictions[1] + a.true_cfg_scale * (noise - predictions[1]);
    latents = scheduler.step(noise, t, latents, step_arguments);
    if (a.callback_on_step_end) {
      CallbackTensors tensors;
      for (const std::string& name : a.callback_on_step_end_tensor_inputs) {
        tensors[name] = name == "latents" ? latents : embeds.prompt_embeds;
      }
      for (auto& [name, tensor] : a.callback_on_step_end(*this, i, t, tensors)) {
        if (name == "latents") latents = tensor;
        if (name == "prompt_embeds") embeds.prompt_embeds = tensor;
      }
    }
    tell("denoise", i + 1, num_timesteps_);
  }
  current_timestep_ = at::Tensor();

  PipelineOutput output;
  if (a.output_type == OutputType::latent) {
    output.tensor = latents;
    return output;
  }
  tell("decode", 0, 1);
  at::Tensor pictures = decode(latents, height, width);
  if (a.output_type == OutputType::image) {
    output.images = images_from_tensor(pictures);
  } else {
    output.tensor = denormalize(pictures);
    if (a.output_type == OutputType::np)
      output.tensor = output.tensor.permute({0, 2, 3, 1}).to(at::kCPU, at::kFloat);
  }
  tell("decode", 1, 1);
  return output;
}

FluxPipelineArguments FluxPipeline::own_arguments(const TextToImageArguments& common) const {
  FluxPipelineArguments a;
  static_cast<CommonArguments&>(a) = common;
  a.true_cfg_scale = common.true_cfg_scale.value_or(a.true_cfg_scale);
  a.guidance_scale = common.guidance_scale.value_or(a.guidance_scale);
  // What the autoencoder was trained on: 1024 for the published models, as is diffusers' default.
  auto trained = value_of<int64_t>(model("vae").config_json(), "sample_size", 0);
  if (trained <= 0) trained = kDefaultSampleSize * vae_scale_factor_;
  a.height = common.height.value_or(trained);
  a.width = common.width.value_or(trained);
  a.num_inference_steps = common.num_inference_steps.value_or(a.num_inference_steps);
  a.max_sequence_length = common.max_sequence_length.value_or(a.max_sequence_length);
  return a;
}

PipelineOutput FluxPipeline::text_to_image(const TextToImageArguments& common) {
  return (*this)(own_arguments(common));
}

CallbackTensors FluxPipeline::encode_prompts(const TextToImageArguments& common) {
  at::NoGradGuard no_grad;
  FluxPipelineArguments a = own_arguments(common);
  a.num_images_per_prompt = 1;
  check_inputs(a, *a.height, *a.width);
  const auto stop_hooks = stop_everywhere(*this, a.stop);
  auto tell = [&](int64_t step) {
    a.stop.throw_if_stopped();
    if (a.progress) a.progress({"encode", step, 1});
  };
  tell(0);
  const Conditioning made = condition(a, [&](const std::vector<std::string>& encoders) {
    std::vector<std::pair<std::string, int64_t>> next;
    for (const std::string& encoder : encoders) next.emplace_back(encoder, 1);
    announce(next);
  });
  tell(1);
  CallbackTensors tensors = {{"prompt_embeds", made.positive.prompt_embeds},
                             {"pooled_prompt_embeds", made.positive.pooled_prompt_embeds}};
  if (made.negative) {
    tensors["negative_prompt_embeds"] = made.negative->prompt_embeds;
    tensors["negative_pooled_prompt_embeds"] = made.negative->pooled_prompt_embeds;
  }
  return tensors;
}

}  // namespace ferry::pipelines
