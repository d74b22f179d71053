// Models in single files, as ComfyUI and stable-diffusion.cpp users have them: as components of a
// pipeline, or a whole pipeline of them (diffusers' from_single_file).
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>

#include "ferry/pipelines/pipeline.h"

namespace ferry::pipelines {

struct LooseFiles {
  // Component ("transformer", "text_encoder_2", "vae") -> .gguf or .safetensors file.
  std::map<std::string, std::filesystem::path> models;
  // "tokenizer", "tokenizer_2" -> folder.
  std::map<std::string, std::filesystem::path> tokenizers;

  bool empty() const { return models.empty() && tokenizers.empty(); }
};

// The files as components, for PipelineLoadOptions::components. `folder`, unless it is empty, is
// the pipeline's: what no shape in a file tells (the size of a head, the axes of its rotation) is
// taken from the component's config there. A T5 text encoder in a GGUF file that holds its
// tokenizer brings "tokenizer_2" too, unless a folder is given. Throws as
// models::load_single_file() and Tokenizer::from_pretrained(), ArgumentError for a file that holds
// another kind of model than its component takes, and where options.quantize names one of them.
std::map<std::string, Component> load_loose_files(const LooseFiles& files,
                                                  const PipelineLoadOptions& options = {},
                                                  const std::filesystem::path& folder = {});

// A pipeline of nothing but loose files, with the scheduler of the published model: FluxPipeline,
// FLUX.1-dev's or, where the transformer takes no guidance, FLUX.1-schnell's. Throws as above, and
// ArgumentError that names the files and tokenizers that are missing.
std::shared_ptr<DiffusionPipeline> pipeline_of_loose_files(const LooseFiles& files,
                                                           const PipelineLoadOptions& options = {});

// The pipeline of a folder with loose files in the place of some components, or, with an empty
// name, of loose files alone. Throws as the functions above and
// DiffusionPipeline::from_pretrained().
std::shared_ptr<DiffusionPipeline> load_pipeline(const std::string& folder_or_name,
                                                 const LooseFiles& files,
                                                 PipelineLoadOptions options = {});

}  // namespace ferry::pipelines
