// Files made from checkpoints that should not be made again each time: lossless packs, later
// weights quantized on the fly or with adapters fused. Content-addressed: a file's key is the
// SHA-256 of what it was made from and how.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "ferry/base/stop_token.h"
#include "ferry/io/file.h"
#include "ferry/io/pack_file.h"

namespace ferry::weights {

// Receives a file's bytes in order.
using ByteSink = std::function<void(std::span<const std::byte>)>;

// What the cache shall hold.
struct CacheContent {
  std::vector<io::PackSource> sources;  // what it is made from,
  std::string recipe;                   // and how: together the key
  std::string origin;                   // where from, for people
  uint64_t expected_bytes = 0;          // room that is made before writing
  std::function<void(const ByteSink&)> write;
  // Throws FormatError for a file that is there and cannot be used: it is made again.
  std::function<void(std::shared_ptr<const io::File>)> is_usable = {};
};

struct CacheEntry {
  std::string key;     // 64 hexadecimal digits
  std::string recipe;  // empty if the manifest cannot be read
  std::string origin;
  uint64_t size_bytes = 0;
  std::filesystem::file_time_type last_used{};
  // Empty, or why the entry is never used ("the file was changed after it was made").
  std::string fault;
};

// One folder; any number of processes. An entry is <key>.pack beside <key>.json, the manifest: it
// counts only if the manifest names this key, follows from its own sources and recipe, and the
// file's size, inode and modification time are those that were published. So a torn, replaced,
// copied or renamed file is never used. Files appear by rename; makers of one key wait for each
// other (flock). What is evicted or removed while in use stays readable to whoever opened it.
// Thread-safe.
class PackCache {
 public:
  // io::cache_folder().
  static std::filesystem::path default_folder();
  // $FERRY_CACHE_LIMIT ("100GB"), else 64 GiB. Throws ArgumentError.
  static uint64_t default_limit_bytes();
  static std::string key(const std::vector<io::PackSource>& sources, const std::string& recipe);

  // Above `limit_bytes` the least recently used entries go.
  explicit PackCache(std::filesystem::path folder = default_folder(),
                     uint64_t limit_bytes = default_limit_bytes());

  const std::filesystem::path& folder() const { return folder_; }
  uint64_t limit_bytes() const { return limit_bytes_; }

  // The entry's file, opened; null if there is none that may be used (a fault is logged). Counts as
  // a use. Never waits.
  std::shared_ptr<const io::File> find(const std::string& key);
  // The same; made if it is not there. Waits while another process makes it. Throws BudgetError for
  // content above the limit, IoError, Cancelled, and what `write` throws; nothing is left then.
  std::shared_ptr<const io::File> find_or_make(const CacheContent& content, StopToken stop = {});

  // All entries, the most recently used first.
  std::vector<CacheEntry> list() const;
  // Reads the whole file. Returns the fault, empty if there is none. Throws Cancelled.
  std::string verify(const std::string& key, StopToken stop = {}) const;
  // False if there is no such entry, or it is being made.
  bool remove(const std::string& key);
  // Removes the least recently used entries until at most `limit_bytes` are left, and what killed
  // makers left behind. `keep` is not removed. Returns the bytes removed.
  uint64_t evict(uint64_t limit_bytes, const std::string& keep = "");

 private:
  std::filesystem::path data_path(const std::string& key) const;
  std::filesystem::path manifest_path(const std::string& key) const;
  std::filesystem::path lock_path(const std::string& key) const;
  void publish(const CacheContent& content, const std::string& key, const StopToken& stop);

  std::filesystem::path folder_;
  uint64_t limit_bytes_;
};

}  // namespace ferry::weights
