// What every pipeline is (diffusers' DiffusionPipeline): named components from one folder, and what
// is done with all of them together.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "ferry/base/stop_token.h"
#include "ferry/hooks/group_offloading.h"
#include "ferry/models/model.h"
#include "ferry/offload/engine.h"
#include "ferry/pipelines/image.h"
#include "ferry/pipelines/prompt_cache.h"
#include "ferry/schedulers/scheduler.h"
#include "ferry/tensor/generator.h"
#include "ferry/text/tokenizer.h"

namespace ferry::pipelines {

// One of model, scheduler, tokenizer; or none for `[null, null]` and for a class that ferry does
// not have and the pipeline can do without.
struct Component {
  std::shared_ptr<models::Model> model;
  std::shared_ptr<schedulers::Scheduler> scheduler;
  std::shared_ptr<const text::Tokenizer> tokenizer;
  // Where it came from; empty for one made in memory.
  std::filesystem::path folder;

  Component() = default;
  Component(std::shared_ptr<models::Model> value) : model(std::move(value)) {}
  Component(std::shared_ptr<schedulers::Scheduler> value) : scheduler(std::move(value)) {}
  Component(std::shared_ptr<const text::Tokenizer> value) : tokenizer(std::move(value)) {}
  explicit operator bool() const { return model || scheduler || tokenizer; }
};

// A dtype for all components, and others for some.
struct DtypeMap {
  std::optional<at::ScalarType> all;
  std::map<std::string, at::ScalarType> components;

  // "bf16", "transformer=bf16,vae=fp32" or "bf16,vae=fp32"; empty keeps what is stored. Throws
  // ArgumentError.
  static DtypeMap parse(const std::string& text);
  std::optional<at::ScalarType> of(const std::string& component) const;
};

// How components are quantized as they are loaded, by name.
using QuantizeMap = std::map<std::string, models::QuantizeOptions>;
// "int8wo" (the transformer), "transformer=int8wo,text_encoder_2=nf4", or with a group size
// "int4wo:64". Throws ArgumentError.
QuantizeMap parse_quantize(const std::string& text);

struct PipelineLoadOptions {
  // Unset keeps the stored dtypes; otherwise as models::LoadOptions.
  DtypeMap dtype;
  std::string variant;
  // Read weights from lossless packs in the pack cache where there are some.
  bool use_packs = false;
  // Components to quantize; kept in the pack cache, so that it is done once.
  QuantizeMap quantize = {};
  // Leave out text encoders and tokenizers: prompts come as embeddings.
  bool without_text_encoders = false;
  // Taken instead of the folder's; `Component()` leaves one out.
  std::map<std::string, Component> components;
};

// What is being done now; told to the progress callback at the start and after each step.
struct Progress {
  std::string stage;  // "encode", "denoise", "decode"
  int64_t step = 0;   // done
  int64_t total = 0;
};
using ProgressCallback = std::function<void(const Progress&)>;

enum class OutputType {
  image,  // Image (diffusers' "pil")
  np,     // float32 [n, height, width, channels] in 0..1
  pt,     // [n, channels, height, width] in 0..1
  latent,
};
// "image" or "pil", "np", "pt", "latent". Throws ArgumentError.
OutputType parse_output_type(std::string_view name);

// A prompt, or one for each picture of a batch: `.prompt = "a cat"`, `.prompt = {"a cat", "a
// dog"}`.
struct Texts : std::vector<std::string> {
  using std::vector<std::string>::vector;
  Texts(const char* text) : std::vector<std::string>{text} {}
  Texts(std::string text) : std::vector<std::string>{std::move(text)} {}
  Texts(std::vector<std::string> texts) : std::vector<std::string>(std::move(texts)) {}
};

class DiffusionPipeline;

// Tensors by their Python names, to and from a step callback.
using CallbackTensors = std::map<std::string, at::Tensor>;
// Called after each step with the tensors that were asked for; what it returns replaces those of
// the same names. `timestep` is one of the scheduler's, a scalar.
using StepCallback =
    std::function<CallbackTensors(DiffusionPipeline& pipeline, int64_t step,
                                  const at::Tensor& timestep, const CallbackTensors& tensors)>;

// The arguments that all text-to-image pipelines share.
struct CommonArguments {
  Texts prompt;
  // For a second text encoder; unset: `prompt`. One stands for all prompts (also the negative
  // ones).
  std::optional<Texts> prompt_2;
  std::optional<Texts> negative_prompt, negative_prompt_2;
  // In the place of the prompts, a row each: [batch, tokens, channels], pooled [batch, channels].
  // encode_prompts() makes them.
  std::optional<at::Tensor> prompt_embeds, pooled_prompt_embeds;
  std::optional<at::Tensor> negative_prompt_embeds, negative_pooled_prompt_embeds;
  int64_t num_images_per_prompt = 1;
  // One draws the whole batch; or one for each picture; none is torch's default.
  std::vector<tensor::Generator> generator;
  // In the form that the pipeline's denoiser takes.
  std::optional<at::Tensor> latents;
  OutputType output_type = OutputType::image;
  StepCallback callback_on_step_end;
  // Every pipeline has "latents" and "prompt_embeds".
  std::vector<std::string> callback_on_step_end_tensor_inputs = {"latents"};
  ProgressCallback progress;
  StopToken stop;
};

// What every text-to-image pipeline takes; unset values are the pipeline's defaults. A pipeline
// throws ArgumentError for one that it cannot follow.
struct TextToImageArguments : CommonArguments {
  std::optional<double> true_cfg_scale, guidance_scale;
  std::optional<int64_t> height, width, num_inference_steps, max_sequence_length;
};

struct PipelineOutput {
  std::vector<Image> images;  // OutputType::image
  at::Tensor tensor;          // the others
};

// Not thread-safe: one generation at a time. Owns its components; an engine may be shared with
// other pipelines.
class DiffusionPipeline {
 public:
  virtual ~DiffusionPipeline();

  // `folder_or_name`: a folder with model_index.json, or "org/repo[@revision]" in the local Hugging
  // Face cache. Reads headers only; weights are read at the first use. Throws IoError (with the
  // download command for a name that is not there), FormatError, ArgumentError (a class that ferry
  // does not have).
  static std::shared_ptr<DiffusionPipeline> from_pretrained(
      const std::string& folder_or_name, const PipelineLoadOptions& options = {});
  // Writes model_index.json and every component; what ferry does not know is kept. Throws IoError.
  void save_pretrained(const std::filesystem::path& folder,
                       uint64_t max_shard_size_bytes = 10'000'000'000,
                       const std::string& variant = "");

  virtual std::string class_name() const = 0;
  virtual PipelineOutput text_to_image(const TextToImageArguments& arguments);
  // What an unset num_inference_steps stands for.
  virtual int64_t default_num_inference_steps() const { return 50; }
  // What the prompts become, under the names of the arguments that take their place; negative ones
  // where they will be used.
  virtual CallbackTensors encode_prompts(const TextToImageArguments& arguments);
  // Outputs of text encoders are remembered by content while the pipeline lives: the same prompt
  // again needs no encoder, unless its weights have changed.
  PromptCache& prompt_cache() { return prompt_cache_; }

  // Pictures of a batch that the denoiser computes at once; the others follow in passes of their
  // own, in lockstep where weights are streamed. 0: all. Each pass gives what it would alone, bit
  // for bit; another number of pictures may round otherwise.
  void set_pictures_per_pass(int64_t pictures) { pictures_per_pass_ = pictures; }
  int64_t pictures_per_pass() const { return pictures_per_pass_; }
  // Where passes in lockstep take turns.
  void set_lockstep_turn(hooks::LockstepTurn turn) { lockstep_turn_ = turn; }
  hooks::LockstepTurn lockstep_turn() const { return lockstep_turn_; }

  // Ends the running generation after this step (from a callback); the rest of the steps are
  // skipped.
  void set_interrupt(bool interrupt) { interrupt_ = interrupt; }
  bool interrupt() const { return interrupt_; }

  // model_index.json as it was read.
  const nlohmann::ordered_json& config() const { return config_; }
  const std::map<std::string, Component>& components() const { return components_; }
  // Throw ArgumentError if there is no such component.
  models::Model& model(const std::string& name) const;
  schedulers::Scheduler& scheduler(const std::string& name = "scheduler") const;
  const text::Tokenizer& tokenizer(const std::string& name) const;
  bool has(const std::string& name) const;

  // Moves all models to `device` (tensor::parse_device()); weights that were not read yet are read
  // straight to it. While weights are streamed, they stay with their engine's device: throws
  // ArgumentError for another.
  void to(at::Device device);

  // Streams the weights of all models through one engine, which other pipelines may share. Throws
  // BudgetError stating the least budget. Components in `exclude_modules` move to the engine's
  // device and stay there, beside the budget; throws ArgumentError for one that there is not.
  void enable_group_offload(std::shared_ptr<offload::Engine> engine,
                            const hooks::GroupOffloadingConfig& config = {},
                            const std::vector<std::string>& exclude_modules = {});
  void disable_group_offload();
  // The same with an engine of its own: all weights together take at most this.
  void set_memory_budget(uint64_t weights_memory_bytes);
  // diffusers' calls of these names. Each component whole on `device` while it runs, the others
  // wait (in pinned host memory; on disk where `device` is the CPU):
  void enable_model_cpu_offload(at::Device device = at::Device(at::kCPU));
  // and each layer by itself, when it is needed: least memory, slowest.
  void enable_sequential_cpu_offload(at::Device device = at::Device(at::kCPU));
  // Null while weights are resident.
  const std::shared_ptr<offload::Engine>& engine() const { return engine_; }

  // What runs of a component took: all passes of a step together, without waiting for weights.
  struct ComputeTime {
    int64_t runs = 0;
    double shortest_s = 0;
  };
  // Since clear_compute_times(), by component. A run that loads the weights is not among them.
  const std::map<std::string, ComputeTime>& compute_times() const { return compute_times_; }
  void clear_compute_times() { compute_times_.clear(); }

 protected:
  DiffusionPipeline(std::map<std::string, Component> components, nlohmann::ordered_json config);
  // Components that run in every step: their first weights are read again while their last compute.
  virtual bool runs_every_step(const std::string& component) const {
    return component == "transformer";
  }
  // Tells the engine which components run next, how often and in which order, so that each is
  // brought while the one before it ends. Names that are not offloaded are passed over.
  void announce(const std::vector<std::pair<std::string, int64_t>>& passes);
  // Modules of a component that this pipeline never calls (an autoencoder's encoder).
  virtual std::vector<std::string> unused_modules(const std::string& component) const { return {}; }
  // Runs passes through a component so that streamed weights cross once for all of them; one after
  // the other where nothing is offloaded. The results are the same.
  void run_together(const std::string& component, std::vector<std::function<void()>> passes,
                    hooks::LockstepTurn turn = hooks::LockstepTurn::group);

  // A batch of texts for a text encoder, and what it makes of them.
  struct PromptJob {
    std::string encoder;  // the component
    Texts texts;
    int64_t max_length = 0;  // tokens
    at::Tensor output = {};
  };
  // Fills in the outputs that are remembered.
  void recall(std::vector<PromptJob>& jobs);
  // Runs `encode` for the other jobs, those of one encoder together, and remembers the outputs.
  void encode(std::vector<PromptJob>& jobs,
              const std::function<at::Tensor(const PromptJob&)>& encode);

 private:
  std::map<std::string, Component> components_;
  nlohmann::ordered_json config_;
  PromptKey prompt_key(const PromptJob& job) const;

  bool interrupt_ = false;
  int64_t pictures_per_pass_ = 0;
  hooks::LockstepTurn lockstep_turn_ = hooks::LockstepTurn::group;
  PromptCache prompt_cache_;
  std::map<std::string, ComputeTime> compute_times_;
  std::shared_ptr<offload::Engine> engine_;
  std::map<std::string, std::shared_ptr<hooks::GroupOffloading>>
      offloading_;  // before components_ in destruction
};

// The registry: an explicit table in registry.cpp, a line a class.
struct PipelineClass {
  std::string_view name;
  std::vector<std::string> required;  // components
  std::function<std::shared_ptr<DiffusionPipeline>(std::map<std::string, Component>,
                                                   nlohmann::ordered_json)>
      make;
};
const std::vector<PipelineClass>& pipeline_classes();

}  // namespace ferry::pipelines
