#include "ferry/io/scratch_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "ferry/base/error.h"

namespace ferry::io {
ScratchFile::ScratchFile(const std::filesystem::path& folder, System& system)
    : path_(folder / "scratch file"), system_(&system) {
  std::error_code ignored;  // opening tells
  std::filesystem::create_directories(folder, ignored);
  fd_ = system.open(folder.c_str(), O_RDWR | O_TMPFILE | O_CLOEXEC, 0600);
  if (fd_ < 0 && (errno == EOPNOTSUPP || errno == EISDIR)) {
    std::string name = (folder / ".ferry-scratch.XXXXXX").string();
    fd_ = ::mkostemp(name.data(), O_CLOEXEC);
    if (fd_ >= 0) ::unlink(name.c_str());
  }
  if (fd_ < 0) {
    throw_error<IoError>(
        "{}: cannot make a scratch file: {}; set FERRY_CACHE_DIR to a folder that can be written",
        folder.string(), std::strerror(errno));
  }
  open_for_reading();
}

ScratchFile::ScratchFile(InMemory, System& system) : path_("scratch memory"), system_(&system) {
  fd_ = ::memfd_create("ferry weights", MFD_CLOEXEC);
  if (fd_ < 0) throw_error<IoError>("memfd_create failed: {}", std::strerror(errno));
  open_for_reading();
}

void ScratchFile::open_for_reading() {
  try {
    file_ = File::open_private("/proc/self/fd/" + std::to_string(fd_), path_, *system_);
  } catch (...) {
    system_->close(fd_);
    throw;
  }
}

ScratchFile::~ScratchFile() {
  system_->close(fd_);
}

uint64_t ScratchFile::append(std::span<const std::byte> bytes) {
  std::span<const std::byte> left = bytes;
  while (!left.empty()) {
    const ssize_t n = system_->write(fd_, left.data(), std::min<size_t>(left.size(), 1 << 30));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      const int reason = n < 0 ? errno : ENOSPC;
      // The next one overwrites what did not get in whole.
      ::lseek(fd_, static_cast<off_t>(end_), SEEK_SET);
      throw_error<IoError>("{}: {} of {} bytes could not be written: {}", path_.string(),
                           left.size(), bytes.size(), std::strerror(reason));
    }
    left = left.subspan(static_cast<size_t>(n));
  }
  return std::exchange(end_, end_ + bytes.size());
}

void ScratchFile::align(uint64_t unit) {
  append(std::vector<std::byte>((unit - end_ % unit) % unit));
}

void ScratchFile::discard(uint64_t offset, uint64_t size_bytes) noexcept {
  if (size_bytes == 0) return;
  ::fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
              static_cast<off_t>(size_bytes));
}

std::filesystem::path cache_folder() {
  auto variable = [](const char* name) -> std::string {
    const char* value = std::getenv(name);
    return value ? value : "";
  };
  if (std::string folder = variable("FERRY_CACHE_DIR"); !folder.empty()) return folder;
  if (std::string folder = variable("XDG_CACHE_HOME"); !folder.empty())
    return std::filesystem::path(folder) / "ferry";
  if (std::string home = variable("HOME"); !home.empty())
    return std::filesystem::path(home) / ".cache" / "ferry";
  return std::filesystem::temp_directory_path() / "ferry";
}

}  // namespace ferry::io
