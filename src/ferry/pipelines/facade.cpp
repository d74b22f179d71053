#include <ATen/Parallel.h>

#include <random>

#include "ferry/base/error.h"
#include "ferry/ferry.h"
#include "ferry/pipelines/picture_options.h"
#include "ferry/pipelines/pipeline.h"
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
  load.variant = options.variant;
  auto state = std::make_unique<State>();
  state->pipeline = pipelines::DiffusionPipeline::from_pretrained(folder_or_name, load);
  if (options.weights_memory_bytes > 0) {
    offload::EngineOptions engine;
    engine.weights_memory_bytes = options.weights_memory_bytes;
    engine.device = device;
    state->pipeline->enable_group_offload(std::make_shared<offload::Engine>(engine));
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
