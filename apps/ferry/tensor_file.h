// Named tensors from and to one safetensors file.
#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <string>

namespace ferry::cli {

// Reads every tensor into memory of its own. Throws IoError, FormatError.
std::map<std::string, at::Tensor> load_tensors(const std::filesystem::path& path);

// Published whole or not at all. Throws IoError, ArgumentError (a dtype safetensors cannot hold).
void save_tensors(const std::filesystem::path& path,
                  const std::map<std::string, at::Tensor>& tensors);

}  // namespace ferry::cli
