#include "ferry/pipelines/pipeline.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <sstream>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/hooks/lockstep.h"
#include "ferry/models/config.h"
#include "ferry/nn/attention_dispatch.h"
#include "ferry/pipelines/hub.h"
#include "ferry/quant/registry.h"
#include "ferry/tensor/dtype.h"
#include "ferry/weights/slot.h"

namespace ferry::pipelines {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

DtypeMap DtypeMap::parse(const std::string& text) {
  DtypeMap map;
  std::stringstream items(text);
  for (std::string item; std::getline(items, item, ',');) {
    size_t split = item.find('=');
    if (split == std::string::npos) {
      map.all = tensor::parse_dtype(item);
    } else {
      map.components[item.substr(0, split)] = tensor::parse_dtype(item.substr(split + 1));
    }
  }
  return map;
}

std::optional<at::ScalarType> DtypeMap::of(const std::string& component) const {
  auto it = components.find(component);
  return it == components.end() ? all : std::optional(it->second);
}

QuantizeMap parse_quantize(const std::string& text) {
  QuantizeMap map;
  std::stringstream items(text);
  for (std::string item; std::getline(items, item, ',');) {
    const size_t split = item.find('=');
    const std::string component =
        split == std::string::npos ? "transformer" : item.substr(0, split);
    models::QuantizeOptions options;
    options.scheme = split == std::string::npos ? item : item.substr(split + 1);
    if (const size_t colon = options.scheme.find(':'); colon != std::string::npos) {
      const std::string group = options.scheme.substr(colon + 1);
      const char* end = group.data() + group.size();
      auto [stop, error] = std::from_chars(group.data(), end, options.group_size);
      if (error != std::errc() || stop != end || options.group_size <= 0) {
        throw_error<ArgumentError>("quantize: got group size '{}', expected a positive number",
                                   group);
      }
      options.scheme.resize(colon);
    }
    quant::find_scheme(options.scheme);  // an unknown one is wrong use, before anything is loaded
    map[component] = options;
  }
  return map;
}

OutputType parse_output_type(std::string_view name) {
  if (name == "image" || name == "pil") return OutputType::image;
  if (name == "np") return OutputType::np;
  if (name == "pt") return OutputType::pt;
  if (name == "latent") return OutputType::latent;
  throw_error<ArgumentError>("output type {}: expected image, np, pt or latent", name);
}

namespace {

const PipelineClass& find_class(const std::string& name, const std::string& where) {
  std::string known;
  for (const PipelineClass& entry : pipeline_classes()) {
    if (entry.name == name) return entry;
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
  }
  throw_error<ArgumentError>("{}: ferry has no pipeline \"{}\"; it has: {}", where, name, known);
}

template <class Table>
bool contains(const Table& table, const std::string& name) {
  return std::any_of(table.begin(), table.end(),
                     [&](const auto& entry) { return entry.name == name; });
}

// A `[library, class]` entry of model_index.json; anything else there is a scalar of the pipeline.
bool is_component(const std::string& key, const Json& value) {
  auto is_name = [](const Json& part) { return part.is_string() || part.is_null(); };
  return !key.starts_with("_") && value.is_array() && value.size() == 2 && is_name(value[0]) &&
         is_name(value[1]);
}

Component load_component(const fs::path& folder, const std::string& name,
                         const std::string& class_name, const PipelineLoadOptions& options) {
  Component component;
  if (contains(models::model_classes(), class_name)) {
    models::LoadOptions load{.dtype = options.dtype.of(name),
                             .variant = options.variant,
                             .use_packs = options.use_packs};
    if (auto it = options.quantize.find(name); it != options.quantize.end())
      load.quantize = it->second;
    component.model = models::load_model(folder, load, class_name);
  } else if (contains(schedulers::scheduler_classes(), class_name)) {
    component.scheduler = schedulers::load_scheduler(folder, class_name);
  } else if (class_name.find("Tokenizer") != std::string::npos) {
    component.tokenizer = text::Tokenizer::from_pretrained(folder, class_name);
  }
  component.folder = folder;
  return component;
}

template <class Map>
void check_names(const char* what, const Map& by_component, const Json& index,
                 const std::string& where) {
  for (const auto& [name, unused] : by_component) {
    auto it = index.find(name);
    if (it == index.end() || !is_component(name, *it)) {
      throw_error<ArgumentError>("{} of \"{}\": {} has no such component", what, name, where);
    }
  }
}

void copy_folder(const fs::path& from, const fs::path& to) {
  fs::create_directories(to);
  for (const auto& entry : fs::directory_iterator(from)) {
    if (!fs::is_regular_file(entry.path())) continue;  // follows the cache's symbolic links
    fs::copy_file(fs::canonical(entry.path()), to / entry.path().filename(),
                  fs::copy_options::overwrite_existing);
  }
}

}  // namespace

std::shared_ptr<DiffusionPipeline> DiffusionPipeline::from_pretrained(
    const std::string& folder_or_name, const PipelineLoadOptions& options) {
  fs::path folder = resolve_folder(folder_or_name);
  std::string hint;
  if (!fs::is_directory(folder_or_name)) {
    hint = "; the copy in the Hugging Face cache may be incomplete, complete it with:\n  " +
           HubName::parse(folder_or_name)->download_command();
  }
  fs::path index_path = folder / "model_index.json";
  if (!fs::exists(index_path)) {
    if (fs::exists(folder / "config.json")) {
      throw_error<ArgumentError>(
          "{}: holds one component, not a pipeline (no model_index.json); give the folder above it",
          folder.string());
    }
    throw_error<IoError>("{}: not the folder of a diffusers pipeline: it has no model_index.json{}",
                         folder.string(), hint);
  }
  Json index = models::read_config(index_path);
  std::string where = index_path.string();
  if (!index.contains("_class_name") || !index["_class_name"].is_string()) {
    throw_error<FormatError>("{}: expected a key \"_class_name\" that names the pipeline", where);
  }
  const PipelineClass& kind = find_class(index["_class_name"], where);
  check_names("dtype", options.dtype.components, index, where);
  check_names("quantize", options.quantize, index, where);

  std::map<std::string, Component> components;
  for (const auto& [name, given] : options.components) {
    if (!index.contains(name) || !is_component(name, index[name])) {
      throw_error<ArgumentError>("component \"{}\" was given, but {} has none of that name", name,
                                 where);
    }
  }
  auto left_out = [&](const std::string& name) {
    return options.without_text_encoders &&
           (name.starts_with("text_encoder") || name.starts_with("tokenizer"));
  };
  for (const auto& [name, value] : index.items()) {
    if (!is_component(name, value)) continue;
    if (name.find('/') != std::string::npos || name == "." || name == "..") {
      throw_error<FormatError>("{}: component name \"{}\" is no folder name", where, name);
    }
    if (auto given = options.components.find(name); given != options.components.end()) {
      components[name] = given->second;
    } else if (value[0].is_null() || value[1].is_null() || left_out(name)) {
      components[name] = Component();
    } else {
      std::string class_name = value[1];
      try {
        components[name] = load_component(folder / name, name, class_name, options);
      } catch (const IoError& error) {
        throw IoError(error.what() + hint);
      }
      if (!components[name]) {
        log::warn("{}: component {} is a {}, which ferry does not have; it is left out",
                  folder.string(), name, class_name);
      }
    }
  }
  for (const std::string& name : kind.required) {
    auto it = components.find(name);
    if (it != components.end() && it->second) continue;
    if (options.components.contains(name) || left_out(name)) continue;  // left out on purpose
    throw_error<ArgumentError>(
        "{}: {} needs the component \"{}\"{}", where, kind.name, name,
        it == components.end() ? ", which is missing"
                               : fmt::format(" ({}), which ferry cannot load", index[name].dump()));
  }
  return kind.make(std::move(components), std::move(index));
}

DiffusionPipeline::DiffusionPipeline(std::map<std::string, Component> components, Json config)
    : components_(std::move(components)), config_(std::move(config)) {}

DiffusionPipeline::~DiffusionPipeline() {
  offloading_.clear();
}

void DiffusionPipeline::save_pretrained(const fs::path& folder, uint64_t max_shard_size_bytes,
                                        const std::string& variant) {
  Json index = config_;
  index["_class_name"] = class_name();
  if (!index.contains("_diffusers_version")) index["_diffusers_version"] = "0.42.1";
  std::error_code error;
  fs::create_directories(folder, error);
  if (error)
    throw_error<IoError>("{}: cannot create the folder: {}", folder.string(), error.message());
  for (const auto& [name, component] : components_) {
    fs::path into = folder / name;
    if (component.model) {
      index[name] = {component.model->library(), component.model->class_name()};
      component.model->save_pretrained(into, max_shard_size_bytes, variant);
    } else if (component.scheduler) {
      index[name] = {"diffusers", component.scheduler->class_name()};
      component.scheduler->save_pretrained(into);
    } else if (component.tokenizer) {
      // The index keeps the class as it was named ("T5TokenizerFast"), unless another was put in.
      if (!index[name].is_array() || index[name][1].is_null())
        index[name] = {"transformers", component.tokenizer->class_name()};
      component.tokenizer->save_pretrained(into);
    } else if (!component.folder.empty()) {
      try {
        if (!fs::exists(into) || !fs::equivalent(component.folder, into))
          copy_folder(component.folder, into);
      } catch (const fs::filesystem_error& failure) {
        throw IoError(failure.what());
      }
    } else {
      index[name] = {nullptr, nullptr};
    }
  }
  // Last, so that a folder with an index is complete.
  models::write_config(folder / "model_index.json", index);
}

PipelineOutput DiffusionPipeline::text_to_image(const TextToImageArguments&) {
  throw_error<ArgumentError>("{} makes no pictures from text", class_name());
}

CallbackTensors DiffusionPipeline::encode_prompts(const TextToImageArguments&) {
  throw_error<ArgumentError>("{} makes no pictures from text", class_name());
}

namespace {
template <class T>
auto& require(const DiffusionPipeline& pipeline, const std::string& name,
              std::shared_ptr<T> Component::*member) {
  auto it = pipeline.components().find(name);
  if (it == pipeline.components().end() || !(it->second.*member)) {
    throw_error<ArgumentError>("{}: the component \"{}\" is needed here but was not loaded",
                               pipeline.class_name(), name);
  }
  return *(it->second.*member);
}
}  // namespace

models::Model& DiffusionPipeline::model(const std::string& name) const {
  return require(*this, name, &Component::model);
}
schedulers::Scheduler& DiffusionPipeline::scheduler(const std::string& name) const {
  return require(*this, name, &Component::scheduler);
}
const text::Tokenizer& DiffusionPipeline::tokenizer(const std::string& name) const {
  return require(*this, name, &Component::tokenizer);
}
bool DiffusionPipeline::has(const std::string& name) const {
  auto it = components_.find(name);
  return it != components_.end() && static_cast<bool>(it->second);
}

void DiffusionPipeline::to(at::Device device) {
  if (engine_) {
    if (engine_->options().device == device) return;
    throw_error<ArgumentError>(
        "{}: its weights are streamed to {}; call disable_group_offload() before to({})",
        class_name(), engine_->options().device.str(), device.str());
  }
  for (const auto& [name, component] : components_) {
    if (component.model && component.model->device() != device) component.model->to(device);
  }
}

void DiffusionPipeline::enable_group_offload(std::shared_ptr<offload::Engine> engine,
                                             const hooks::GroupOffloadingConfig& config,
                                             const std::vector<std::string>& exclude_modules) {
  for (const std::string& name : exclude_modules) model(name);  // throws if there is none
  disable_group_offload();
  try {
    for (const auto& [name, component] : components_) {
      if (!component.model) continue;
      if (std::find(exclude_modules.begin(), exclude_modules.end(), name) !=
          exclude_modules.end()) {
        component.model->to(engine->options().device);
        continue;
      }
      hooks::GroupOffloadingConfig own = config;
      own.wrap_around = config.wrap_around && runs_every_step(name);
      for (const std::string& unused : unused_modules(name)) own.unused.push_back(unused);
      offloading_[name] = hooks::apply_group_offloading(
          *component.model, component.model->binding(), engine, own, name);
    }
  } catch (...) {
    offloading_.clear();
    throw;
  }
  engine_ = std::move(engine);
}

void DiffusionPipeline::disable_group_offload() {
  offloading_.clear();
  engine_.reset();
}

void DiffusionPipeline::set_memory_budget(uint64_t weights_memory_bytes) {
  offload::EngineOptions options;
  options.weights_memory_bytes = weights_memory_bytes;
  enable_group_offload(std::make_shared<offload::Engine>(options));
}

void DiffusionPipeline::enable_model_cpu_offload(at::Device device) {
  offload::EngineOptions options;
  options.device = device;
  options.host_memory_bytes = device.is_cpu() ? 0 : offload::EngineOptions::kAllWeights;
  // The largest component whole, beside the small weights of all of them; and what the pieces are
  // rounded up to.
  uint64_t largest = 0, small = 0;
  for (const auto& [name, component] : components_) {
    if (!component.model) continue;
    uint64_t bytes = 0;
    for (const weights::Slot& slot : weights::collect_slots(*component.model)) {
      const uint64_t size = slot.size_bytes();
      if (size < options.small_slot_bytes) {
        small += size;
      } else {
        constexpr uint64_t kRoundingOfASlot = 12 << 10;
        bytes += size + kRoundingOfASlot;
      }
    }
    largest = std::max(largest, bytes);
  }
  options.weights_memory_bytes = largest + small;
  enable_group_offload(std::make_shared<offload::Engine>(options), {.gather_embeddings = false});
}

void DiffusionPipeline::enable_sequential_cpu_offload(at::Device device) {
  offload::EngineOptions options;
  options.device = device;
  options.host_memory_bytes = device.is_cpu() ? 0 : offload::EngineOptions::kAllWeights;
  options.read_ahead = false;
  enable_group_offload(std::make_shared<offload::Engine>(options), {.use_stream = false});
}

void DiffusionPipeline::announce(const std::vector<std::pair<std::string, int64_t>>& passes) {
  if (!engine_) return;
  std::vector<offload::Engine::Announced> next;
  for (const auto& [name, count] : passes) {
    auto offloading = offloading_.find(name);
    if (offloading != offloading_.end()) next.push_back({&offloading->second->client(), count});
  }
  engine_->announce(std::move(next));
}

void DiffusionPipeline::run_together(const std::string& component,
                                     std::vector<std::function<void()>> passes,
                                     hooks::LockstepTurn turn) {
  const bool streamed = offloading_.contains(component);
  const bool loads = !streamed && !model(component).weights_loaded();
  auto stalled = [&] { return streamed ? engine_->report().stall_seconds : 0.0; };
  const auto began = std::chrono::steady_clock::now();
  const double stalled_before = stalled();
  if (streamed && passes.size() > 1) {
    hooks::run_lockstep({offloading_[component].get()}, std::move(passes), turn);
  } else {
    for (const std::function<void()>& pass : passes) pass();
  }
  if (loads) return;
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count() -
      (stalled() - stalled_before);
  ComputeTime& time = compute_times_[component];
  time.shortest_s = time.runs++ == 0 ? seconds : std::min(time.shortest_s, seconds);
}

PromptKey DiffusionPipeline::prompt_key(const PromptJob& job) const {
  const models::Model& encoder = model(job.encoder);
  PromptKey key{.encoder = job.encoder, .texts = job.texts, .max_length = job.max_length};
  const auto offloading = offloading_.find(job.encoder);
  key.weights = offloading != offloading_.end()
                    ? offloading->second->weights_state()
                    : weights::WeightsState(encoder, encoder.binding().get());
  key.setting = fmt::format("{} threads {}", encoder.device().str(), at::get_num_threads());
  for (const auto& module : encoder.modules()) {
    const auto* attention = dynamic_cast<const nn::AttentionModule*>(module.get());
    if (!attention) continue;
    key.setting += " " + attention->processor_name();
    if (attention->attention_backend())
      key.setting += fmt::format(":{}", static_cast<int>(*attention->attention_backend()));
  }
  return key;
}

void DiffusionPipeline::recall(std::vector<PromptJob>& jobs) {
  for (PromptJob& job : jobs)
    job.output = prompt_cache_.find(prompt_key(job), model(job.encoder).device());
}

void DiffusionPipeline::encode(std::vector<PromptJob>& jobs,
                               const std::function<at::Tensor(const PromptJob&)>& encode) {
  std::vector<std::string> encoders;
  for (const PromptJob& job : jobs) {
    if (!job.output.defined() &&
        std::find(encoders.begin(), encoders.end(), job.encoder) == encoders.end())
      encoders.push_back(job.encoder);
  }
  for (const std::string& encoder : encoders) {
    std::vector<std::function<void()>> passes;
    std::vector<PromptJob*> computed;
    for (PromptJob& job : jobs) {
      if (job.encoder != encoder || job.output.defined()) continue;
      computed.push_back(&job);
      passes.emplace_back([&job, &encode] { job.output = encode(job); });
    }
    run_together(encoder, std::move(passes));
    // The weights are known for what they are after the run: it notices those that were changed.
    for (PromptJob* job : computed) prompt_cache_.put(prompt_key(*job), job->output);
  }
}

}  // namespace ferry::pipelines
