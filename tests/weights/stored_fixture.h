// Small checkpoints on disk for the tests of packs and their cache.
#pragma once

#include <ATen/ATen.h>

#include <cstring>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "ferry/io/safetensors.h"
#include "ferry/tensor/dtype.h"
#include "ferry/weights/binding.h"
#include "ferry/weights/checkpoint.h"

namespace ferry::weights {

using Tensors = std::vector<std::pair<std::string, at::Tensor>>;

inline void write_checkpoint(const std::filesystem::path& file, const Tensors& tensors) {
  std::vector<io::SafetensorsWriter::Entry> entries;
  for (const auto& [name, tensor] : tensors)
    entries.push_back({name, tensor::from_torch(tensor.scalar_type()), tensor.sizes().vec()});
  io::SafetensorsWriter writer(file, entries);
  for (const auto& [name, tensor] : tensors) {
    writer.write({static_cast<const std::byte*>(tensor.const_data_ptr()),
                  static_cast<size_t>(tensor.nbytes())});
  }
  writer.finish();
}

// Equal bit for bit: NaNs included.
inline bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         (a.nbytes() == 0 || std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0);
}

inline bool same_bits(const Checkpoint& checkpoint, const Tensors& tensors) {
  if (checkpoint.tensors().size() != tensors.size()) return false;
  for (const auto& [name, tensor] : tensors) {
    const StoredTensor* stored = checkpoint.find(name);
    if (!stored || !same_bits(read_stored(*stored), tensor)) return false;
  }
  return true;
}

}  // namespace ferry::weights
