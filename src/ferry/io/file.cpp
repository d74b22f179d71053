#include "ferry/io/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

#include "ferry/base/error.h"

namespace ferry::io {
namespace {

// Linux counts a single read's bytes in an int.
constexpr size_t kMaxReadBytes = 1u << 30;

FileIdentity identity_of(const struct stat& st) {
  return {.device = st.st_dev,
          .inode = st.st_ino,
          .size_bytes = static_cast<uint64_t>(st.st_size),
          .mtime_ns = static_cast<int64_t>(st.st_mtim.tv_sec) * 1'000'000'000 + st.st_mtim.tv_nsec};
}

// struct statx up to the fields of Linux 6.1, which glibc 2.36 does not have yet; older kernels
// leave them zero and do not set the bit in the mask.
struct StatxDirect {
  uint32_t mask;
  uint8_t skipped[148];
  uint32_t memory_align;
  uint32_t offset_align;
  uint8_t rest[96];
};
static_assert(sizeof(StatxDirect) == 256);
constexpr uint32_t kStatxDioalign = 0x2000;

// What the file system wants for O_DIRECT: 0 if it refuses it, 4096 where it does not say.
uint64_t query_direct_alignment(int fd) {
  constexpr uint64_t kUsual = 4096;
#ifdef SYS_statx
  StatxDirect st{};
  if (::syscall(SYS_statx, fd, "", AT_EMPTY_PATH, kStatxDioalign, &st) != 0) return kUsual;
  if ((st.mask & kStatxDioalign) == 0) return kUsual;
  if (st.memory_align == 0 || st.offset_align == 0) return 0;
  return std::bit_ceil<uint64_t>(std::max(st.memory_align, st.offset_align));
#else
  return kUsual;
#endif
}

}  // namespace

std::shared_ptr<const File> File::open(const std::filesystem::path& path, System& system) {
  std::shared_ptr<File> file(new File(system));
  file->path_ = path;
  // O_NONBLOCK: a FIFO without a writer must give an error and not wait for one.
  file->buffered_fd_ = system.open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file->buffered_fd_ < 0) {
    throw_error<IoError>("{}: cannot open: {}", path.string(), std::strerror(errno));
  }
  struct stat st {};
  if (system.fstat(file->buffered_fd_, &st) != 0) {
    throw_error<IoError>("{}: cannot stat: {}", path.string(), std::strerror(errno));
  }
  if (!S_ISREG(st.st_mode)) {
    throw_error<IoError>("{}: expected a regular file, got {}", path.string(),
                         S_ISDIR(st.st_mode) ? "a folder" : "a device, pipe or socket");
  }
  file->opened_ = identity_of(st);
  file->open_direct();
  return file;
}

std::shared_ptr<const File> File::open_private(const std::filesystem::path& path,
                                               const std::filesystem::path& name, System& system) {
  std::shared_ptr<File> file = std::const_pointer_cast<File>(open(path, system));
  file->path_ = name;
  file->opened_.size_bytes = static_cast<uint64_t>(INT64_MAX);
  file->private_ = true;
  return file;
}

void File::open_direct() {
  uint64_t alignment = query_direct_alignment(buffered_fd_);
  if (alignment == 0) return;
  // Through /proc, since the path may name another file by now.
  std::string self = "/proc/self/fd/" + std::to_string(buffered_fd_);
  int fd = system_->open(self.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  if (fd < 0) fd = system_->open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT | O_NONBLOCK);
  if (fd < 0) return;
  struct stat st {};
  if (system_->fstat(fd, &st) != 0 || st.st_dev != opened_.device || st.st_ino != opened_.inode) {
    system_->close(fd);
    return;
  }
  direct_fd_ = fd;
  direct_alignment_ = alignment;
}

File::~File() {
  if (direct_fd_ >= 0) system_->close(direct_fd_);
  if (buffered_fd_ >= 0) system_->close(buffered_fd_);
}

void File::check_unchanged() const {
  if (private_) return;
  struct stat st {};
  if (system_->fstat(buffered_fd_, &st) != 0) {
    throw_error<IoError>("{}: cannot stat the open file: {}", path_.string(), std::strerror(errno));
  }
  FileIdentity now = identity_of(st);
  if (now.size_bytes != opened_.size_bytes) {
    throw_error<IoError>(
        "{}: got a file of {} bytes, expected {} as when it was opened: it was {} in place while "
        "in "
        "use. Load it again; to replace a checkpoint safely, write a new file and rename it",
        path_.string(), now.size_bytes, opened_.size_bytes,
        now.size_bytes < opened_.size_bytes ? "truncated" : "extended");
  }
  if (now.mtime_ns != opened_.mtime_ns) {
    throw_error<IoError>(
        "{}: the file was modified in place while in use (same size, newer time). Load it again; "
        "to "
        "replace a checkpoint safely, write a new file and rename it",
        path_.string());
  }
}

void File::read_exact(uint64_t offset, size_t size, std::byte* into) const {
  if (offset > opened_.size_bytes || size > opened_.size_bytes - offset) {
    throw_error<IoError>("{}: {} bytes at offset {} are past the end, the file has {}",
                         path_.string(), size, offset, opened_.size_bytes);
  }
  size_t done = 0;
  while (done < size) {
    ssize_t n = system_->pread(buffered_fd_, into + done, std::min(size - done, kMaxReadBytes),
                               offset + done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      throw_error<IoError>("{}: cannot read {} bytes at offset {}: {}", path_.string(), size,
                           offset, std::strerror(errno));
    }
    if (n == 0) {
      throw_error<IoError>(
          "{}: read at offset {} got {} bytes, expected {}: the file was truncated while in use",
          path_.string(), offset, done, size);
    }
    done += static_cast<size_t>(n);
  }
}

void File::drop_cache() const {
  ::posix_fadvise(buffered_fd_, 0, 0, POSIX_FADV_DONTNEED);
}

}  // namespace ferry::io
