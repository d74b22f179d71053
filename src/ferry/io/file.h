// The seam to the operating system for files that are read at offsets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

#include "ferry/io/system.h"

namespace ferry::io {

// What identifies the content of a file without reading it: compared to notice a file that was
// changed in place or replaced while a pipeline runs.
struct FileIdentity {
  uint64_t device = 0;
  uint64_t inode = 0;
  uint64_t size_bytes = 0;
  int64_t mtime_ns = 0;
  bool operator==(const FileIdentity&) const = default;
};

// An open file for stateless reads. Thread-safe. Holds up to two descriptors: one buffered, one
// with O_DIRECT where the file system takes it. A file that is replaced by rename stays readable.
class File {
 public:
  // Throws IoError if `path` cannot be opened or is no regular file. `system` must outlive the
  // file.
  static std::shared_ptr<const File> open(const std::filesystem::path& path,
                                          System& system = System::real());
  // A file that nobody else can reach and that may grow: no size is held against it, and
  // check_unchanged() does not ask. `name` is for messages.
  static std::shared_ptr<const File> open_private(const std::filesystem::path& path,
                                                  const std::filesystem::path& name,
                                                  System& system = System::real());
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  const std::filesystem::path& path() const { return path_; }
  uint64_t size_bytes() const { return opened_.size_bytes; }
  int buffered_fd() const { return buffered_fd_; }
  // -1 where O_DIRECT is refused.
  int direct_fd() const { return direct_fd_; }
  // What O_DIRECT wants of offset, length and address (STATX_DIOALIGN, else 4096); a power of two.
  uint64_t direct_alignment() const { return direct_alignment_; }

  const FileIdentity& opened() const { return opened_; }
  // Throws IoError if the open file was truncated or changed in place since open() (fstat).
  void check_unchanged() const;

  // Reads exactly `size` bytes at `offset` through the page cache; throws IoError, naming file,
  // offset, got and expected. Nothing beyond the size at opening is read.
  void read_exact(uint64_t offset, size_t size, std::byte* into) const;
  // Drops this file's clean pages from the page cache (posix_fadvise DONTNEED).
  void drop_cache() const;

  System& system() const { return *system_; }

 private:
  explicit File(System& system) : system_(&system) {}
  void open_direct();

  System* system_;
  std::filesystem::path path_;
  int buffered_fd_ = -1;
  int direct_fd_ = -1;
  uint64_t direct_alignment_ = 4096;
  FileIdentity opened_;
  bool private_ = false;
};

}  // namespace ferry::io
