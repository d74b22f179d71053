// Single-file checkpoints: a .gguf or .safetensors file without a config.json, as ComfyUI,
// stable-diffusion.cpp and llama.cpp write them (diffusers' from_single_file).
#pragma once

#include <nlohmann/json.hpp>

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ferry/io/gguf.h"
#include "ferry/models/model.h"
#include "ferry/quant/stored_weights.h"

namespace ferry::models {

// A file, or one model of several in it, under the model's parameter names. Nothing is read but the
// header.
struct SingleFile {
  std::string class_name;
  std::string key_map;            // which names the file uses, for messages
  nlohmann::ordered_json config;  // as its config.json would be
  quant::StoredWeights weights;
  std::shared_ptr<const io::File> file;
  std::map<std::string, std::string> metadata;  // of a safetensors file
  io::GgufMetadata gguf;                        // of a GGUF file: its tokenizer among others
  bool is_gguf = false;
};

// Finds out by its keys which model a file holds (key_maps.h), and by shapes how large it is.
// `class_name` chooses among several, and between CLIPTextModel and CLIPTextModelWithProjection.
// Throws IoError; FormatError for a header that lies, a file that is no model ferry knows or not
// `class_name`, tensors whose shapes contradict their names.
SingleFile open_single_file(const std::filesystem::path& path, const std::string& class_name = "");

// The config of a model whose weights are known by parameter name: sizes by shapes; what no shape
// tells is as in the published models (FLUX.1, its autoencoder, T5 v1.1, CLIP L, H and bigG).
// Throws FormatError, naming `where`, for a tensor that is missing or of a shape that does not fit.
nlohmann::ordered_json config_by_shapes(const std::string& class_name,
                                        const quant::StoredWeights& weights,
                                        const io::GgufMetadata& gguf, const std::string& where);

// Quantized weights become plain ones that are dequantized to `dtype` as they are read: for models
// that are to be saved or quantized anew.
void dequantize_when_read(SingleFile& single, io::Dtype dtype);

// Makes the model of an open file and binds it, as load_single_file().
std::shared_ptr<Model> bind_single_file(SingleFile single, const LoadOptions& options = {},
                                        const nlohmann::ordered_json& config = {});

// Opens `path`, makes the model and binds it. Entries of `config` replace those that were found by
// shapes (axes_dims_rope where heads are not of 128, norm_num_groups other than 32). Without
// options.dtype a GGUF file's model is bfloat16, and so are float8 tensors without scales; other
// tensors of a safetensors file keep their dtype. Throws as open_single_file() and load_model(),
// and ArgumentError for a pack or variant, which single files do not have.
std::shared_ptr<Model> load_single_file(const std::filesystem::path& path,
                                        const LoadOptions& options = {},
                                        const std::string& class_name = "",
                                        const nlohmann::ordered_json& config = {});

}  // namespace ferry::models
