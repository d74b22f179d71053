// A checkpoint: the tensors of one or more safetensors files, found by key, not read.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "ferry/io/safetensors.h"
#include "ferry/weights/encoding.h"

namespace ferry::weights {

struct StoredTensor {
  std::string key;
  io::Dtype dtype = io::Dtype::F32;
  std::vector<int64_t> shape;
  std::shared_ptr<const io::File> file;
  uint64_t offset = 0;
  uint64_t size_bytes = 0;  // in the file
  // Null: the bytes in the file are the tensor's. Else decode() makes them, and no part of the
  // tensor can be had by reading at an offset.
  std::shared_ptr<const Encoding> encoding = nullptr;

  // Bytes of the tensor in memory, as its dtype.
  uint64_t plain_bytes() const;
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
  static std::shared_ptr<const Checkpoint> open_file(std::shared_ptr<const io::File> file);
  // Of tensors that another format describes (lossless_pack.h). Throws FormatError for the same key
  // twice.
  static std::shared_ptr<const Checkpoint> of_tensors(
      std::vector<StoredTensor> tensors, std::map<std::string, std::string> metadata,
      std::vector<std::shared_ptr<const io::File>> files);

  // In the order of files and offsets.
  const std::vector<StoredTensor>& tensors() const { return tensors_; }
  // Null if there is none.
  const StoredTensor* find(const std::string& key) const;
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::vector<std::shared_ptr<const io::File>>& files() const { return files_; }
  // Sum of size_bytes: what reading everything reads.
  uint64_t total_bytes() const;

 private:
  void add_file(std::shared_ptr<const io::File> file);
  void index_tensors();
  std::vector<StoredTensor> tensors_;
  std::unordered_map<std::string, size_t> by_key_;
  std::map<std::string, std::string> metadata_;
  std::vector<std::shared_ptr<const io::File>> files_;
};

}  // namespace ferry::weights
