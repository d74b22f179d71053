// A checkpoint: the tensors of one or more safetensors files, found by key, not read.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "ferry/io/safetensors.h"

namespace ferry::weights {

struct StoredTensor {
  std::string key;
  io::Dtype dtype = io::Dtype::F32;
  std::vector<int64_t> shape;
  std::shared_ptr<const io::File> file;
  uint64_t offset = 0;
  uint64_t size_bytes = 0;
};

// Immutable after opening; thread-safe.
class Checkpoint {
 public:
  // Opens a component folder: `base` is "diffusion_pytorch_model" or "model"; an index.json decides
  // which shards there are, and with a variant ("fp16") the names carry it as diffusers writes
  // them. Throws IoError, FormatError (a shard that is missing or truncated, a key that the index
  // places in a shard without it, the same key in two shards).
  static std::shared_ptr<const Checkpoint> open_folder(const std::filesystem::path& folder,
                                                       const std::string& base,
                                                       const std::string& variant = "");
  static std::shared_ptr<const Checkpoint> open_file(const std::filesystem::path& file);

  // In the order of files and offsets.
  const std::vector<StoredTensor>& tensors() const { return tensors_; }
  // Null if there is none.
  const StoredTensor* find(const std::string& key) const;
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::vector<std::shared_ptr<const io::File>>& files() const { return files_; }
  uint64_t total_bytes() const;

 private:
  void add_file(const std::filesystem::path& path);
  void index_tensors();
  std::vector<StoredTensor> tensors_;
  std::unordered_map<std::string, size_t> by_key_;
  std::map<std::string, std::string> metadata_;
  std::vector<std::shared_ptr<const io::File>> files_;
};

}  // namespace ferry::weights
