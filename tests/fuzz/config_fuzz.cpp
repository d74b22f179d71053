// Configs from anywhere, of each model, scheduler and pipeline that ferry has: refused with an
// error of ferry's, or made, without memory for weights and in a moment.
#include <ATen/ATen.h>

#include <cstdlib>
#include <nlohmann/json.hpp>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/io/json_file.h"
#include "ferry/pipelines/pipeline.h"
#include "scratch_folder.h"

namespace {

using namespace ferry;
using Json = nlohmann::ordered_json;

void check(bool holds) {
  if (!holds) std::abort();
}

template <class Classes>
bool has_class(const Classes& classes, const std::string& name) {
  return std::any_of(classes.begin(), classes.end(),
                     [&](const auto& entry) { return entry.name == name; });
}

void try_model(const std::string& name, const Json& config) {
  auto model = models::make_model(name, config, "input");
  model->traits();
  uint64_t bytes = weights::total_bytes(weights::collect_slots(*model));
  check(bytes < (uint64_t{1} << 62));  // nothing overflowed on the way
  Json written = model->config_json();
  // What it writes, it takes, and writes again.
  check(models::make_model(name, written, "written")->config_json() == written);
}

void try_scheduler(const std::string& name, const Json& config) {
  auto scheduler = schedulers::make_scheduler(name, config, "input");
  scheduler->set_timesteps({.num_inference_steps = 3, .mu = 0.8});
  check(scheduler->timesteps().numel() == 3);
  at::Tensor x = at::zeros({1, 2, 2});
  for (int i = 0; i < 3; ++i) {
    scheduler->set_begin_index(i);
    x = scheduler->step(at::ones_like(x), scheduler->timesteps()[i], x);
  }
  Json written = scheduler->config_json();
  check(schedulers::make_scheduler(name, written, "written")->config_json() == written);
}

// The components of a real pipeline beside the index that is tried.
void try_pipeline(std::string_view text, const Json& index) {
  namespace fs = std::filesystem;
  static const fs::path source = FERRY_FIXTURES "/pipelines/flux-tiny";
  static const fuzz::ScratchFolder folder("pipeline");
  static const bool linked = [] {
    for (const auto& entry : fs::directory_iterator(source)) {
      if (entry.is_directory())
        fs::create_directory_symlink(entry.path(), folder.path() / entry.path().filename());
    }
    return true;
  }();
  (void)linked;
  folder.write("model_index.json", text);
  pipelines::PipelineLoadOptions options;
  for (const char* name : {"tokenizer", "tokenizer_2"}) {  // large files, with targets of their own
    static std::map<std::string, pipelines::Component> loaded;
    if (!loaded.contains(name)) loaded[name] = text::Tokenizer::from_pretrained(source / name);
    if (index.contains(name)) options.components[name] = loaded[name];
  }
  auto pipeline = pipelines::DiffusionPipeline::from_pretrained(folder.path().string(), options);
  check(pipeline->config() == index);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const bool quiet = (log::set_level(log::Level::off), true);
  (void)quiet;
  std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    if (!io::parse_json(text, "input").is_object()) return 0;
    Json config = Json::parse(text);
    std::string name;
    if (auto it = config.find("_class_name"); it != config.end() && it->is_string()) name = *it;
    if (auto it = config.find("architectures"); it != config.end() && it->is_array()) {
      if (!it->empty() && (*it)[0].is_string()) name = (*it)[0];
    }
    if (has_class(models::model_classes(), name)) try_model(name, config);
    if (has_class(schedulers::scheduler_classes(), name)) try_scheduler(name, config);
    if (has_class(pipelines::pipeline_classes(), name)) try_pipeline(text, config);
  } catch (const Error&) {
  }
  return 0;
}
