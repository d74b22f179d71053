#include "ferry/weights/pack_cache.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <set>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/base/units.h"
#include "ferry/io/atomic_file.h"
#include "ferry/io/checksum.h"
#include "ferry/io/json_file.h"
#include "ferry/io/scratch_file.h"
#include "ferry/weights/file_lock.h"

namespace ferry::weights {
namespace fs = std::filesystem;
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kFormat = "ferry-cache";
constexpr uint64_t kMaxManifestBytes = 1 << 20;

// What a manifest says; `fault` if it says nothing useful.
struct Manifest {
  std::string recipe, origin, fault;
  io::FileIdentity identity;  // of the data file
  uint64_t checksum = 0;
};

bool is_key(std::string_view text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

// A change to any of these makes another key. The name is not among them: a checkpoint found under
// another path is the same.
Json identity_json(const io::PackSource& source) {
  return {{"device", source.identity.device},
          {"inode", source.identity.inode},
          {"size_bytes", source.identity.size_bytes},
          {"mtime_ns", source.identity.mtime_ns},
          {"header_sha256", source.header_sha256}};
}

std::string key_of(const Json& sources, const std::string& recipe) {
  std::string text = Json{{"sources", sources}, {"recipe", recipe}}.dump();
  return io::sha256_hex(std::as_bytes(std::span(text)));
}

Manifest read_manifest(const fs::path& path, const std::string& key) {
  Manifest manifest;
  try {
    Json json = Json::parse(io::read_text_file(path, kMaxManifestBytes));
    manifest.recipe = json.at("recipe");
    manifest.origin = json.at("origin");
    manifest.identity.inode = json.at("inode");
    manifest.identity.size_bytes = json.at("size_bytes");
    manifest.identity.mtime_ns = json.at("mtime_ns");
    manifest.checksum = io::parse_checksum(json.at("checksum"), path.string());
    if (json.at("format") != kFormat || json.at("version") != 1) {
      manifest.fault = "its manifest is of another version of ferry";
    } else if (json.at("key") != key || key_of(json.at("sources"), manifest.recipe) != key) {
      manifest.fault = "its manifest belongs to another entry";
    }
  } catch (const nlohmann::json::exception&) {
    manifest.fault = "its manifest cannot be read";
  } catch (const Error& error) {
    manifest.fault = error.what();
  }
  return manifest;
}

// Why `file` is not the one that was published; empty if it is.
std::string fault_of(const Manifest& manifest, const io::FileIdentity& file) {
  if (!manifest.fault.empty()) return manifest.fault;
  if (manifest.identity.size_bytes != file.size_bytes) {
    return fmt::format("the file has {} bytes, expected {}", file.size_bytes,
                       manifest.identity.size_bytes);
  }
  // The device's number may change when the machine starts again; the inode does not.
  if (manifest.identity.inode != file.inode || manifest.identity.mtime_ns != file.mtime_ns)
    return "the file was replaced or changed after it was made";
  return "";
}

// The entry's file if it may be used; else null and the reason.
std::shared_ptr<const io::File> open_entry(const fs::path& data, const Manifest& manifest,
                                           std::string& fault) {
  fault = manifest.fault;
  if (!fault.empty()) return nullptr;
  try {
    auto file = io::File::open(data);
    fault = fault_of(manifest, file->opened());
    return fault.empty() ? file : nullptr;
  } catch (const IoError& error) {
    fault = error.what();
    return nullptr;
  }
}

void make_folder(const fs::path& folder) {
  std::error_code error;
  fs::create_directories(folder, error);
  if (error) {
    throw_error<IoError>("{}: cannot make the cache folder: {}; name another in FERRY_CACHE_DIR",
                         folder.string(), error.message());
  }
}

const char* environment(const char* name) {
  const char* value = std::getenv(name);
  return value && *value ? value : nullptr;
}

}  // namespace

fs::path PackCache::default_folder() {
  return io::cache_folder();
}

uint64_t PackCache::default_limit_bytes() {
  if (const char* limit = environment("FERRY_CACHE_LIMIT"))
    return parse_bytes(limit, "FERRY_CACHE_LIMIT");
  return 64_GiB;
}

std::string PackCache::key(const std::vector<io::PackSource>& sources, const std::string& recipe) {
  Json json = Json::array();
  for (const io::PackSource& source : sources) json.push_back(identity_json(source));
  return key_of(json, recipe);
}

PackCache::PackCache(fs::path folder, uint64_t limit_bytes)
    : folder_(std::move(folder) / "packs"), limit_bytes_(limit_bytes) {}

fs::path PackCache::data_path(const std::string& key) const {
  return folder_ / (key + ".pack");
}
fs::path PackCache::manifest_path(const std::string& key) const {
  return folder_ / (key + ".json");
}
fs::path PackCache::lock_path(const std::string& key) const {
  return folder_ / (key + ".lock");
}

std::shared_ptr<const io::File> PackCache::find(const std::string& key) {
  const fs::path path = manifest_path(key);
  std::error_code error;
  if (!is_key(key) || !fs::exists(path, error)) return nullptr;
  std::string fault;
  auto file = open_entry(data_path(key), read_manifest(path, key), fault);
  if (!file) {
    log::warn("cache entry {}: {}; it is not used", key.substr(0, 12), fault);
    return nullptr;
  }
  // The manifest's time is when the entry was last used. Whether it could be noted does not matter.
  [[maybe_unused]] int ignored = ::utimensat(AT_FDCWD, path.c_str(), nullptr, 0);
  return file;
}

std::shared_ptr<const io::File> PackCache::find_or_make(const CacheContent& content,
                                                        StopToken stop) {
  const std::string key = PackCache::key(content.sources, content.recipe);
  auto usable = [&]() -> std::shared_ptr<const io::File> {
    auto file = find(key);
    if (!file || !content.is_usable) return file;
    try {
      content.is_usable(file);
      return file;
    } catch (const FormatError& error) {
      log::warn("{}; it is made again", error.what());
      return nullptr;
    }
  };
  if (auto file = usable()) return file;
  if (content.expected_bytes > limit_bytes_) {
    throw_error<BudgetError>(
        "the cache may hold {}, and the pack of {} needs about {}; set FERRY_CACHE_LIMIT to more",
        format_bytes(limit_bytes_), content.origin, format_bytes(content.expected_bytes));
  }
  make_folder(folder_);
  std::optional<FileLock> lock = FileLock::attempt(lock_path(key));
  if (!lock) {
    log::info("waiting for another process that makes cache entry {}", key.substr(0, 12));
    lock.emplace(FileLock::wait(lock_path(key), stop));
  }
  auto file = usable();  // another process may have made it meanwhile
  if (!file) {
    try {
      publish(content, key, stop);
    } catch (...) {
      lock->remove_file();
      throw;
    }
    file = find(key);
    if (!file) {
      lock->remove_file();
      throw_error<IoError>("{}: the entry that was just made cannot be used",
                           data_path(key).string());
    }
  }
  lock->remove_file();
  lock.reset();
  evict(limit_bytes_, key);
  return file;
}

void PackCache::publish(const CacheContent& content, const std::string& key,
                        const StopToken& stop) {
  std::error_code ignored;
  fs::remove(manifest_path(key), ignored);  // of an entry that cannot be used
  fs::remove(data_path(key), ignored);
  evict(limit_bytes_ - std::min(limit_bytes_, content.expected_bytes), key);
  io::Checksum sum;
  {
    io::AtomicFile out(data_path(key));
    content.write([&](std::span<const std::byte> bytes) {
      stop.throw_if_stopped();
      sum.update(bytes);
      out.write(bytes);
    });
    out.commit();
  }
  const io::FileIdentity identity = io::File::open(data_path(key))->opened();
  Json sources = Json::array();
  for (const io::PackSource& source : content.sources) sources.push_back(identity_json(source));
  Json manifest = {{"format", kFormat},
                   {"version", 1},
                   {"key", key},
                   {"recipe", content.recipe},
                   {"origin", content.origin},
                   {"sources", sources},
                   {"size_bytes", identity.size_bytes},
                   {"inode", identity.inode},
                   {"mtime_ns", identity.mtime_ns},
                   {"checksum", io::checksum_text(sum.value())}};
  io::write_file(manifest_path(key),
                 manifest.dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
}

std::vector<CacheEntry> PackCache::list() const {
  std::vector<CacheEntry> entries;
  std::error_code error;
  for (const auto& file : fs::directory_iterator(folder_, error)) {
    const std::string key = file.path().stem().string();
    if (file.path().extension() != ".json" || !is_key(key)) continue;
    Manifest manifest = read_manifest(file.path(), key);
    CacheEntry entry;
    entry.key = key;
    entry.recipe = manifest.recipe;
    entry.origin = manifest.origin;
    entry.last_used = file.last_write_time(error);
    open_entry(data_path(key), manifest, entry.fault);
    const uint64_t size = fs::file_size(data_path(key), error);
    entry.size_bytes = error ? 0 : size;
    entries.push_back(std::move(entry));
  }
  std::sort(entries.begin(), entries.end(), [](const CacheEntry& a, const CacheEntry& b) {
    return std::tie(b.last_used, a.key) < std::tie(a.last_used, b.key);
  });
  return entries;
}

std::string PackCache::verify(const std::string& key, StopToken stop) const {
  Manifest manifest = read_manifest(manifest_path(key), key);
  std::string fault;
  auto file = open_entry(data_path(key), manifest, fault);
  if (!file) return fault;
  io::Checksum sum;
  std::vector<std::byte> buffer(4 << 20);
  try {
    for (uint64_t done = 0; done < file->size_bytes(); done += buffer.size()) {
      stop.throw_if_stopped();
      const size_t size = std::min<uint64_t>(buffer.size(), file->size_bytes() - done);
      file->read_exact(done, size, buffer.data());
      sum.update({buffer.data(), size});
    }
  } catch (const IoError& error) {
    return error.what();
  }
  return sum.value() == manifest.checksum ? "" : "its bytes are damaged: the checksum differs";
}

bool PackCache::remove(const std::string& key) {
  std::error_code error;
  if (!is_key(key) || !fs::is_directory(folder_, error)) return false;
  std::optional<FileLock> lock = FileLock::attempt(lock_path(key));
  if (!lock) return false;
  // The manifest first: without it the rest is nothing.
  bool removed = fs::remove(manifest_path(key), error);
  removed |= fs::remove(data_path(key), error);
  lock->remove_file();
  return removed;
}

uint64_t PackCache::evict(uint64_t limit_bytes, const std::string& keep) {
  std::error_code error;
  if (!fs::is_directory(folder_, error)) return 0;
  FileLock lock = FileLock::wait(folder_ / "evict.lock");
  std::vector<CacheEntry> entries = list();
  uint64_t sum = 0;
  std::set<std::string> known;
  for (const CacheEntry& entry : entries) {
    known.insert(entry.key);
    sum += entry.size_bytes;
  }
  // Those that nobody can use go first, then the least recently used.
  std::stable_partition(entries.begin(), entries.end(),
                        [](const CacheEntry& entry) { return entry.fault.empty(); });
  uint64_t removed = 0;
  for (auto entry = entries.rbegin(); entry != entries.rend(); ++entry) {
    if (sum - removed <= limit_bytes) break;
    if (entry->key == keep || !remove(entry->key)) continue;
    log::info("cache: removed {} ({}, {})", entry->key.substr(0, 12),
              format_bytes(entry->size_bytes),
              entry->fault.empty() ? "the least recently used" : entry->fault);
    removed += entry->size_bytes;
  }
  // A file without a manifest, or under a temporary name (".<key>.pack.tmp-…"): its maker was
  // killed, unless it still holds the lock.
  std::vector<fs::path> left;
  for (const auto& file : fs::directory_iterator(folder_, error)) {
    std::string name = file.path().filename().string();
    const bool temporary = name.starts_with(".") && name.find(".tmp-") != std::string::npos;
    const std::string key = name.substr(temporary ? 1 : 0, 64);
    if (!is_key(key) || key == keep) continue;
    const bool orphan = !known.contains(key) && file.path().extension() == ".pack";
    if (temporary || orphan) left.push_back(file.path());
  }
  for (const fs::path& path : left) {
    std::string name = path.filename().string();
    const std::string key = name.substr(name.starts_with(".") ? 1 : 0, 64);
    std::optional<FileLock> maker = FileLock::attempt(lock_path(key));
    if (!maker) continue;
    const uint64_t size = fs::file_size(path, error);
    const bool orphan = !name.starts_with(".");
    if (orphan && fs::exists(manifest_path(key), error)) {
      maker->remove_file();
      continue;  // it was published since the folder was listed
    }
    if (fs::remove(path, error)) removed += size;
    maker->remove_file();
  }
  return removed;
}

}  // namespace ferry::weights
