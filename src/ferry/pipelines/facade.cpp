#include <ATen/Parallel.h>

#include <random>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/ferry.h"
#include "ferry/pipelines/loose_files.h"
#include "ferry/pipelines/memory_budget.h"
#include "ferry/pipelines/picture_options.h"
#include "ferry/pipelines/pipeline.h"
#include "ferry/pipelines/time_estimate.h"
#include "ferry/tensor/device.h"

namespace ferry {

namespace pipelines {

uint64_t seed_of(const PictureOptions& options) {
  return options.seed.value_or(std::random_device{}());
}

TextToImageArguments arguments_of(const PictureOptions& options, uint64_t seed) {
  TextToImageArguments arguments;
  arguments.prompt = options.prompt;
  if (options.negative_prompt) arguments.negative_prompt = Texts(*options.negative_prompt);
  arguments.width = options.width;
  arguments.height = options.height;
  arguments.num_inference_steps = options.steps;
  arguments.guidance_scale = options.guidance_scale;
  arguments.true_cfg_scale = options.true_cfg_scale;
  arguments.max_sequence_length = options.max_sequence_length;
  arguments.num_images_per_prompt = options.num_images;
  arguments.generator = {tensor::Generator().manual_seed(seed)};
  if (options.on_progress) {
    arguments.progress = [&options](const Progress& progress) {
      options.on_progress({progress.stage, progress.step, progress.total});
    };
  }
  return arguments;
}

}  // namespace pipelines

struct Pipeline::State {
  std::shared_ptr<pipelines::DiffusionPipeline> pipeline;
  at::Device device = at::kCPU;
  // Where a budget for everything was given: how large pictures become decides what it leaves for
  // weights.
  std::optional<pipelines::MemoryRequest> memory;
  std::optional<pipelines::GenerationSize> size;

  void set_memory(const pipelines::TextToImageArguments& arguments) {
    const pipelines::GenerationSize now = pipelines::generation_size(*pipeline, arguments);
    if (!memory || now == size) return;
    const pipelines::MemoryChoice choice =
        pipelines::choose_memory(*pipeline, now, device, *memory);
    memory->program_bytes = choice.split.program_bytes;  // from now on there are weights beside it
    offload::EngineOptions engine;
    engine.device = device;
    pipelines::apply_memory(*pipeline, choice, engine);
    pipeline->clear_compute_times();
    size = now;
    const offload::Measurements measurements(offload::Measurements::default_folder());
    log::info("memory {}; {}", choice.describe(),
              pipelines::estimate_time(*pipeline, now, arguments.num_inference_steps, device,
                                       choice.weights_memory_bytes(), 0, measurements)
                  .describe());
  }
};

Pipeline::Pipeline(std::unique_ptr<State> state) : state_(std::move(state)) {}
Pipeline::~Pipeline() = default;
Pipeline::Pipeline(Pipeline&&) noexcept = default;
Pipeline& Pipeline::operator=(Pipeline&&) noexcept = default;

Pipeline Pipeline::load(const std::string& folder_or_name, const PipelineOptions& options) {
  if (options.threads > 0) at::set_num_threads(options.threads);
  tensor::open_accelerator();  // before anything else asks torch for one
  at::Device device = tensor::parse_device(options.device);
  pipelines::PipelineLoadOptions load;
  load.dtype = pipelines::DtypeMap::parse(options.dtype);
  load.quantize = pipelines::parse_quantize(options.quantize);
  load.variant = options.variant;
  if (options.weights_memory_bytes > 0 && !options.memory.empty()) {
    throw_error<ArgumentError>(
        "memory and weights_memory_bytes exclude each other: the first is all that may be held, "
        "the "
        "second the weights' part of it");
  }
  if (options.reserve_bytes > 0 && options.memory.empty())
    throw_error<ArgumentError>("reserve_bytes is a part of memory, which is not given");
  auto state = std::make_unique<State>();
  state->device = device;
  pipelines::LooseFiles files;
  for (const auto& [component, file] : options.files)
    (component.starts_with("tokenizer") ? files.tokenizers : files.models)[component] = file;
  state->pipeline = pipelines::load_pipeline(folder_or_name, files, load);
  if (options.weights_memory_bytes > 0) {
    offload::EngineOptions engine;
    engine.weights_memory_bytes = options.weights_memory_bytes;
    engine.device = device;
    state->pipeline->enable_group_offload(std::make_shared<offload::Engine>(engine));
  } else if (!options.memory.empty()) {
    state->memory =
        pipelines::MemoryRequest{.memory_bytes = pipelines::parse_memory(options.memory, "memory"),
                                 .reserve_bytes = options.reserve_bytes};
  } else {
    state->pipeline->to(device);
  }
  return Pipeline(std::move(state));
}

std::vector<Picture> Pipeline::generate(const PictureOptions& options) {
  uint64_t seed = pipelines::seed_of(options);
  StopSource stop;
  std::stop_callback forward_stop(options.stop, [&stop] { stop.request_stop(); });
  pipelines::TextToImageArguments arguments = pipelines::arguments_of(options, seed);
  arguments.stop = stop.token();
  state_->set_memory(arguments);
  std::vector<Picture> pictures;
  for (pipelines::Image& image : state_->pipeline->text_to_image(arguments).images) {
    if (image.channels != 3)
      throw_error<Error>("a picture with {} channels, expected 3", image.channels);
    Picture picture{image.width, image.height, std::move(image.pixels), {}};
    picture.text = {
        {"prompt", options.prompt}, {"seed", std::to_string(seed)}, {"Software", "ferry"}};
    if (options.negative_prompt)
      picture.text.insert(picture.text.begin() + 1, {"negative_prompt", *options.negative_prompt});
    pictures.push_back(std::move(picture));
  }
  pipelines::remember_times(
      *state_->pipeline, pipelines::generation_size(*state_->pipeline, arguments), state_->device,
      offload::Measurements(offload::Measurements::default_folder()));
  return pictures;
}

uint64_t Pipeline::bytes_streamed() const {
  return state_->pipeline->engine() ? state_->pipeline->engine()->report().bytes_read : 0;
}

std::string Pipeline::class_name() const {
  return state_->pipeline->class_name();
}

void Picture::save(const std::string& path) const {
  pipelines::save_image({width, height, 3, rgb}, path, {.text = text});
}

}  // namespace ferry
