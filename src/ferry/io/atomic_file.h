// Files that appear whole or not at all.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

#include "ferry/io/system.h"

namespace ferry::io {

// Writes beside `path` without a name where the file system can (O_TMPFILE: not even a killed
// process leaves anything), else under a temporary name, and publishes with commit(): fsync,
// rename, fsync of the folder. The destructor of an uncommitted file removes what was written. A
// symbolic link is followed; a device or pipe (/dev/stdout) is written straight. Not thread-safe.
class AtomicFile {
 public:
  // Throws IoError if the folder does not exist or cannot be written.
  explicit AtomicFile(const std::filesystem::path& path, System& system = System::real());
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  // Throws IoError, naming the file, the bytes that fit and the reason (a full disk).
  void write(std::span<const std::byte> bytes);
  // Replaces what is at `path`. Throws IoError; then nothing has changed there.
  void commit();

 private:
  void discard() noexcept;
  std::filesystem::path path_;
  std::filesystem::path temporary_;  // empty while the file has no name
  System* system_;
  int fd_ = -1;
  bool straight_ = false;
  uint64_t written_ = 0;
};

// Writes a whole file atomically. Throws IoError.
void write_file(const std::filesystem::path& path, std::string_view text);
void write_file(const std::filesystem::path& path, std::span<const std::byte> bytes);

}  // namespace ferry::io
