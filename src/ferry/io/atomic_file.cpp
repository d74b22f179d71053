#include "ferry/io/atomic_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

#include "ferry/base/error.h"

namespace ferry::io {
namespace fs = std::filesystem;
namespace {

constexpr size_t kMaxWriteBytes = 1u << 30;

fs::path folder_of(const fs::path& path) {
  return path.has_parent_path() ? path.parent_path() : fs::path(".");
}

fs::path temporary_name(const fs::path& path) {
  static std::atomic<uint64_t> counter{0};
  // A long name must stay within the 255 bytes that a file system takes.
  std::string stem = path.filename().string().substr(0, 180);
  return folder_of(path) / fmt::format(".{}.tmp-{}-{}", stem, ::getpid(), counter++);
}

// The file that `path` leads to, so that a link stays a link.
fs::path follow(const fs::path& path) {
  std::error_code error;
  if (!fs::is_symlink(fs::symlink_status(path, error))) return path;
  fs::path target = fs::weakly_canonical(path, error);
  return error ? path : target;
}

}  // namespace

AtomicFile::AtomicFile(const fs::path& path, System& system)
    : path_(follow(path)), system_(&system) {
  if (!path_.has_filename()) {
    throw_error<IoError>("{}: cannot write: the path names no file", path.string());
  }
  std::error_code error;
  fs::file_status status = fs::status(path_, error);
  if (fs::is_directory(status)) {
    throw_error<IoError>("{}: cannot write: it is a folder", path.string());
  }
  if (fs::exists(status) && !fs::is_regular_file(status)) {
    straight_ = true;
    fd_ = system.open(path_.c_str(), O_WRONLY | O_CLOEXEC);
  } else {
    fd_ = system.open(folder_of(path_).c_str(), O_TMPFILE | O_WRONLY | O_CLOEXEC, 0666);
    // EISDIR, ENOENT: kernels and file systems without O_TMPFILE ignore part of the flag.
    if (fd_ < 0 && (errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL || errno == ENOENT)) {
      temporary_ = temporary_name(path_);
      fd_ = system.open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    }
  }
  if (fd_ < 0) {
    int reason = errno;
    temporary_.clear();
    throw_error<IoError>("{}: cannot write: {}{}", path.string(), std::strerror(reason),
                         reason == ENOENT ? " (does the folder exist?)" : "");
  }
}

AtomicFile::~AtomicFile() {
  discard();
}

void AtomicFile::discard() noexcept {
  if (fd_ >= 0) system_->close(fd_);
  fd_ = -1;
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
  temporary_.clear();
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  if (fd_ < 0) throw_error<IoError>("{}: write after commit", path_.string());
  while (!bytes.empty()) {
    ssize_t n = system_->write(fd_, bytes.data(), std::min(bytes.size(), kMaxWriteBytes));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      int reason = n == 0 ? EIO : errno;
      throw_error<IoError>("{}: cannot write {} bytes after the first {}: {}{}", path_.string(),
                           bytes.size(), written_, std::strerror(reason),
                           reason == ENOSPC ? "; free space there or choose another folder" : "");
    }
    written_ += static_cast<uint64_t>(n);
    bytes = bytes.subspan(static_cast<size_t>(n));
  }
}

void AtomicFile::commit() {
  if (fd_ < 0) throw_error<IoError>("{}: committed twice", path_.string());
  auto fail = [&](const char* what) {
    int reason = errno;
    throw_error<IoError>("{}: cannot {}: {}", path_.string(), what, std::strerror(reason));
  };
  if (straight_) {
    discard();
    return;
  }
  if (system_->fsync(fd_) != 0) fail("flush to disk");
  if (temporary_.empty()) {
    // linkat() never replaces, so the nameless file gets a temporary name for the rename.
    fs::path name = temporary_name(path_);
    std::string self = "/proc/self/fd/" + std::to_string(fd_);
    if (::linkat(AT_FDCWD, self.c_str(), AT_FDCWD, name.c_str(), AT_SYMLINK_FOLLOW) != 0) {
      fail("name the file");
    }
    temporary_ = name;
  }
  if (system_->rename(temporary_.c_str(), path_.c_str()) != 0) fail("rename into place");
  temporary_.clear();
  discard();
  // The rename itself is durable once the folder is. A file system that cannot sync a folder has
  // its own ordering; the file is complete either way.
  int folder = system_->open(folder_of(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder >= 0) {
    system_->fsync(folder);
    system_->close(folder);
  }
}

void write_file(const fs::path& path, std::span<const std::byte> bytes) {
  AtomicFile file(path);
  file.write(bytes);
  file.commit();
}

void write_file(const fs::path& path, std::string_view text) {
  write_file(path, std::as_bytes(std::span(text.data(), text.size())));
}

}  // namespace ferry::io
