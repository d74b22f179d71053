#include "ferry/weights/checkpoint.h"

#include <algorithm>
#include <set>

#include "ferry/base/error.h"
#include "ferry/io/json_file.h"

namespace ferry::weights {
namespace fs = std::filesystem;

namespace {

// diffusers puts the variant before the extension, and before the shard number of transformers'
// and diffusers' shards: "model.fp16.safetensors", "model.safetensors.index.fp16.json".
std::string with_variant(const std::string& stem, const std::string& variant) {
  return variant.empty() ? stem : stem + "." + variant;
}

// The shard names an index lists. They are file names in this folder: anything that leads elsewhere
// is refused.
std::map<std::string, std::string> read_weight_map(const fs::path& index) {
  nlohmann::ordered_json json = io::read_json_file(index);
  auto map = json.is_object() ? json.find("weight_map") : json.end();
  if (map == json.end() || !map->is_object()) {
    throw_error<FormatError>("{}: expected an object \"weight_map\" (key -> shard file)",
                             index.string());
  }
  std::map<std::string, std::string> weight_map;
  for (const auto& [key, value] : map->items()) {
    if (!value.is_string()) {
      throw_error<FormatError>("{}: weight_map[\"{}\"]: expected a file name, got {}",
                               index.string(), key, value.dump());
    }
    std::string name = value.get<std::string>();
    if (name.empty() || fs::path(name).filename() != fs::path(name) || name == "." ||
        name == "..") {
      throw_error<FormatError>(
          "{}: weight_map[\"{}\"]: \"{}\" is not the name of a file in this folder", index.string(),
          key, name);
    }
    weight_map.emplace(key, std::move(name));
  }
  return weight_map;
}

}  // namespace

uint64_t StoredTensor::plain_bytes() const {
  if (!encoding) return size_bytes;
  auto bytes = static_cast<uint64_t>(io::item_size(dtype));
  for (int64_t extent : shape) bytes *= static_cast<uint64_t>(extent);
  return bytes;
}

void Checkpoint::add_file(std::shared_ptr<const io::File> file) {
  io::SafetensorsHeader header = io::read_safetensors_header(*file);
  for (io::TensorInfo& info : header.tensors) {
    tensors_.push_back({std::move(info.name), info.dtype, std::move(info.shape), file, info.offset,
                        info.size_bytes});
  }
  metadata_.merge(header.metadata);
  files_.push_back(std::move(file));
}

void Checkpoint::index_tensors() {
  by_key_.reserve(tensors_.size());
  for (size_t i = 0; i < tensors_.size(); ++i) {
    auto [entry, is_new] = by_key_.emplace(tensors_[i].key, i);
    if (!is_new) {
      throw_error<FormatError>("key \"{}\" is in two shards: {} and {}", tensors_[i].key,
                               tensors_[entry->second].file->path().string(),
                               tensors_[i].file->path().string());
    }
  }
}

std::shared_ptr<const Checkpoint> Checkpoint::open_file(const fs::path& file) {
  return open_file(io::File::open(file));
}

std::shared_ptr<const Checkpoint> Checkpoint::open_file(std::shared_ptr<const io::File> file) {
  auto checkpoint = std::make_shared<Checkpoint>();
  checkpoint->add_file(std::move(file));
  checkpoint->index_tensors();
  return checkpoint;
}

std::shared_ptr<const Checkpoint> Checkpoint::of_tensors(
    std::vector<StoredTensor> tensors, std::map<std::string, std::string> metadata,
    std::vector<std::shared_ptr<const io::File>> files) {
  auto checkpoint = std::make_shared<Checkpoint>();
  checkpoint->tensors_ = std::move(tensors);
  checkpoint->metadata_ = std::move(metadata);
  checkpoint->files_ = std::move(files);
  checkpoint->index_tensors();
  return checkpoint;
}

std::shared_ptr<const Checkpoint> Checkpoint::open_folder(const fs::path& folder,
                                                          const std::string& base,
                                                          const std::string& variant) {
  fs::path single = folder / (with_variant(base, variant) + ".safetensors");
  fs::path index =
      folder / (base + ".safetensors.index" + (variant.empty() ? "" : "." + variant) + ".json");
  if (!fs::exists(index)) {
    if (!fs::exists(single)) {
      throw_error<IoError>(
          "{}: no weights: neither {} nor {} is there. If the folder holds .bin files or another "
          "variant, "
          "convert it with Python's save_pretrained(safe_serialization=True) or pass --variant",
          folder.string(), single.filename().string(), index.filename().string());
    }
    return open_file(single);
  }
  std::map<std::string, std::string> weight_map = read_weight_map(index);
  std::set<std::string> shards;
  for (const auto& [key, shard] : weight_map) shards.insert(shard);

  auto checkpoint = std::make_shared<Checkpoint>();
  for (const std::string& shard : shards) {
    if (!fs::exists(folder / shard)) {
      throw_error<IoError>("{}: shard {} is missing, which {} names; download the folder again",
                           folder.string(), shard, index.filename().string());
    }
    checkpoint->add_file(io::File::open(folder / shard));
  }
  checkpoint->index_tensors();
  for (const auto& [key, shard] : weight_map) {
    const StoredTensor* tensor = checkpoint->find(key);
    if (!tensor || tensor->file->path().filename() != shard) {
      throw_error<FormatError>("{}: key \"{}\" should be in {}, which does not hold it",
                               index.string(), key, shard);
    }
  }
  return checkpoint;
}

const StoredTensor* Checkpoint::find(const std::string& key) const {
  auto entry = by_key_.find(key);
  return entry == by_key_.end() ? nullptr : &tensors_[entry->second];
}

uint64_t Checkpoint::total_bytes() const {
  uint64_t sum = 0;
  for (const StoredTensor& tensor : tensors_) sum += tensor.size_bytes;
  return sum;
}

}  // namespace ferry::weights
