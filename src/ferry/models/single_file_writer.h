// Models as single files, the way back of single_file.h: .safetensors or .gguf under the names that
// ComfyUI, stable-diffusion.cpp and llama.cpp know.
#pragma once

#include <filesystem>
#include <functional>
#include <optional>

#include "ferry/base/stop_token.h"
#include "ferry/io/ggml_type.h"
#include "ferry/models/model.h"

namespace ferry::models {

struct WriteSingleFileOptions {
  // Unset: a safetensors file of the stored dtypes. Set: a GGUF file whose matrices are of this
  // type, F32, F16, BF16 or one that quant::find_quantize() writes; what does not fit (rows that
  // are no whole blocks, convolutions) is F16 then, and vectors, tensors of at most 1024 elements
  // and T5's position bias are F32, as city96's and llama.cpp's converters have it.
  std::optional<io::GgmlType> gguf_type = {};
  StopToken stop = {};
  // Called after each tensor: how many of how many.
  std::function<void(size_t done, size_t count)> on_tensor = {};
};

// Reads one tensor of the file at a time from where `model` is bound. A GGUF file of T5 holds no
// tokenizer. Throws ArgumentError for a class or type that ferry does not write and for weights
// that are quantized already, IoError, Cancelled; the file appears whole or not at all.
void write_single_file(Model& model, const std::filesystem::path& path,
                       const WriteSingleFileOptions& options = {});

}  // namespace ferry::models
