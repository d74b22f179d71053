#include "ferry/pipelines/loose_files.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <vector>

#include "ferry/base/error.h"
#include "ferry/models/config.h"
#include "ferry/models/single_file.h"
#include "ferry/pipelines/hub.h"
#include "ferry/text/sentencepiece_model.h"

namespace ferry::pipelines {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

namespace {

struct Slot {
  std::string_view component, class_name, library;
  // Without its encoder a pipeline still runs on embeddings.
  bool is_text;
};

// What FluxPipeline is made of.
constexpr std::array kFlux = {
    Slot{"transformer", "FluxTransformer2DModel", "diffusers", false},
    Slot{"vae", "AutoencoderKL", "diffusers", false},
    Slot{"text_encoder", "CLIPTextModel", "transformers", true},
    Slot{"text_encoder_2", "T5EncoderModel", "transformers", true},
    Slot{"tokenizer", "CLIPTokenizer", "transformers", true},
    Slot{"tokenizer_2", "T5TokenizerFast", "transformers", true},
};

const Slot& slot_of(const std::string& component, bool tokenizer) {
  for (const Slot& slot : kFlux) {
    if (slot.component == component && slot.component.starts_with("tokenizer") == tokenizer)
      return slot;
  }
  throw_error<ArgumentError>(
      "component \"{}\": expected {}", component,
      tokenizer ? "tokenizer or tokenizer_2" : "transformer, text_encoder, text_encoder_2 or vae");
}

const io::GgufValue& require(const io::GgufMetadata& metadata, const char* key,
                             const std::string& where) {
  const io::GgufValue* value = io::find_value(metadata, key);
  if (!value) throw_error<FormatError>("{}: has no metadata \"{}\"", where, key);
  return *value;
}

// The pieces that a GGUF file of a T5 encoder brings along (llama.cpp's tokenizer.ggml); nothing
// where it has none.
std::optional<text::SentencePieceModel> pieces_of(const models::SingleFile& file) {
  const std::string where = file.file->path().string();
  const io::GgufValue* model = io::find_value(file.gguf, "tokenizer.ggml.model");
  if (!model || !model->as_string() || *model->as_string() != "t5") return std::nullopt;
  const auto* tokens = require(file.gguf, "tokenizer.ggml.tokens", where).as_strings();
  const auto* scores =
      std::get_if<std::vector<double>>(&require(file.gguf, "tokenizer.ggml.scores", where).data);
  const auto types = require(file.gguf, "tokenizer.ggml.token_type", where).as_integers();
  if (!tokens || !scores || !types || scores->size() != tokens->size() ||
      types->size() != tokens->size()) {
    throw_error<FormatError>(
        "{}: tokenizer.ggml.tokens, scores and token_type: expected three lists of one length",
        where);
  }
  text::SentencePieceModel pieces;
  for (size_t i = 0; i < tokens->size(); ++i) {
    if ((*types)[i] < 1 || (*types)[i] > 6) {
      throw_error<FormatError>("{}: tokenizer.ggml.token_type: got {}, expected 1 to 6", where,
                               (*types)[i]);
    }
    pieces.pieces.push_back({(*tokens)[i], static_cast<float>((*scores)[i]),
                             static_cast<text::SentencePieceModel::Type>((*types)[i])});
  }
  if (const io::GgufValue* map = io::find_value(file.gguf, "tokenizer.ggml.precompiled_charsmap")) {
    const auto bytes = map->as_integers();
    if (!bytes) {
      throw_error<FormatError>("{}: tokenizer.ggml.precompiled_charsmap: expected a list of bytes",
                               where);
    }
    for (int64_t byte : *bytes) pieces.precompiled_charsmap += static_cast<char>(byte);
  }
  return pieces;
}

// The config of a pipeline's component without what the shapes in a file tell better: a file may be
// FLUX.1-schnell where the folder is FLUX.1-dev. Empty where there is none.
Json config_beside(const fs::path& folder, const std::string& component) {
  const fs::path path = folder / component / "config.json";
  if (folder.empty() || !fs::exists(path)) return Json::object();
  Json config = models::read_config(path);
  for (const char* told :
       {"quantization_config", "guidance_embeds", "num_layers", "num_single_layers", "in_channels",
        "joint_attention_dim", "pooled_projection_dim"})
    config.erase(told);
  return config;
}

Json scheduler_config(bool has_guidance) {
  Json config = {{"_class_name", "FlowMatchEulerDiscreteScheduler"},
                 {"base_image_seq_len", 256},
                 {"base_shift", 0.5},
                 {"max_image_seq_len", 4096},
                 {"max_shift", 1.15},
                 {"num_train_timesteps", 1000},
                 {"shift", has_guidance ? 3.0 : 1.0},
                 {"use_dynamic_shifting", has_guidance}};
  return config;
}

}  // namespace

std::map<std::string, Component> load_loose_files(const LooseFiles& files,
                                                  const PipelineLoadOptions& options,
                                                  const fs::path& folder) {
  std::map<std::string, Component> components;
  for (const auto& [component, tokenizer] : files.tokenizers) {
    const Slot& slot = slot_of(component, /*tokenizer=*/true);
    components[component].tokenizer =
        text::Tokenizer::from_pretrained(tokenizer, std::string(slot.class_name));
    components[component].folder = tokenizer;
  }
  for (const auto& [component, path] : files.models) {
    const Slot& slot = slot_of(component, /*tokenizer=*/false);
    if (options.quantize.contains(component)) {
      throw_error<ArgumentError>(
          "quantize of \"{}\": {} is a single file; convert it to a folder first (ferry convert), "
          "or name a file that is quantized",
          component, path.string());
    }
    if (options.without_text_encoders && slot.is_text) continue;
    models::SingleFile file = models::open_single_file(path, std::string(slot.class_name));
    if (component == "text_encoder_2" && !components.contains("tokenizer_2")) {
      if (auto pieces = pieces_of(file)) {
        components["tokenizer_2"].tokenizer =
            text::Tokenizer::from_sentencepiece(std::move(*pieces), path.string());
      }
    }
    components[component].model = models::bind_single_file(
        std::move(file), {.dtype = options.dtype.of(component)}, config_beside(folder, component));
  }
  return components;
}

std::shared_ptr<DiffusionPipeline> pipeline_of_loose_files(const LooseFiles& files,
                                                           const PipelineLoadOptions& options) {
  std::map<std::string, Component> components = load_loose_files(files, options);
  Json index = {{"_class_name", "FluxPipeline"}, {"_diffusers_version", "0.42.1"}};
  std::vector<std::string> missing;
  for (const Slot& slot : kFlux) {
    const std::string name(slot.component);
    index[name] = {slot.library, slot.class_name};
    if (components[name] || (options.without_text_encoders && slot.is_text)) continue;
    missing.push_back("--" + name);
    std::replace(missing.back().begin(), missing.back().end(), '_', '-');
  }
  if (!missing.empty()) {
    throw_error<ArgumentError>(
        "a pipeline of loose files needs {} too: a file for each model, a folder for each "
        "tokenizer; or name a pipeline folder with --model that has them",
        fmt::join(missing, ", "));
  }
  const Json transformer = components["transformer"].model->config_json();
  index["scheduler"] = {"diffusers", "FlowMatchEulerDiscreteScheduler"};
  components["scheduler"].scheduler = schedulers::make_scheduler(
      "FlowMatchEulerDiscreteScheduler",
      scheduler_config(transformer.value("guidance_embeds", false)), "built-in scheduler config");
  for (const PipelineClass& kind : pipeline_classes()) {
    if (kind.name == "FluxPipeline") return kind.make(std::move(components), std::move(index));
  }
  throw Error("FluxPipeline is not registered");
}

std::shared_ptr<DiffusionPipeline> load_pipeline(const std::string& folder_or_name,
                                                 const LooseFiles& files,
                                                 PipelineLoadOptions options) {
  if (folder_or_name.empty()) {
    if (files.empty()) throw ArgumentError("got neither a pipeline's folder nor files of models");
    return pipeline_of_loose_files(files, options);
  }
  const fs::path folder = resolve_folder(folder_or_name);
  for (const auto& [name, component] : load_loose_files(files, options, folder)) {
    // The folder's own tokenizer comes before one that is in a model's file.
    if (component.model || files.tokenizers.contains(name)) options.components[name] = component;
  }
  return DiffusionPipeline::from_pretrained(folder_or_name, options);
}

}  // namespace ferry::pipelines
