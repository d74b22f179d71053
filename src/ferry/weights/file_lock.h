// Locks between processes, on a file of their own.
#pragma once

#include <filesystem>
#include <optional>

#include "ferry/base/stop_token.h"

namespace ferry::weights {

// Holds flock(2) on `path`, which is made if needed. The kernel releases it with the process, so
// nothing stays locked after a crash. Move-only.
class FileLock {
 public:
  // Waits, exclusively. Throws IoError, Cancelled.
  static FileLock wait(const std::filesystem::path& path, const StopToken& stop = {});
  // Nothing if another holds it.
  static std::optional<FileLock> attempt(const std::filesystem::path& path);

  FileLock(FileLock&& other) noexcept;
  FileLock& operator=(FileLock&&) = delete;
  ~FileLock();
  // Removes the file while it is still locked: whoever waits for it notices and takes a new one.
  void remove_file();

 private:
  FileLock(std::filesystem::path path, int fd) : path_(std::move(path)), fd_(fd) {}
  std::filesystem::path path_;
  int fd_;
};

}  // namespace ferry::weights
