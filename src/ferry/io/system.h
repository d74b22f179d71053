// The calls that io/ makes to the operating system, behind one seam, so that tests can put a system
// that fails (short reads, EIO, a full disk) in the place of the real one.
#pragma once

#include <sys/stat.h>
#include <sys/types.h>

#include <cstddef>
#include <cstdint>

namespace ferry::io {

// The real system; a twin for tests overrides what should fail. All methods are thread-safe, return
// what the system call of that name returns and leave its errno.
class System {
 public:
  virtual ~System() = default;

  virtual int open(const char* path, int flags, mode_t mode = 0);
  virtual int close(int fd);
  virtual int fstat(int fd, struct stat* into);
  virtual ssize_t pread(int fd, void* into, size_t size, uint64_t offset);
  virtual ssize_t write(int fd, const void* from, size_t size);
  virtual int fsync(int fd);
  virtual int rename(const char* from, const char* to);
  // Sees the result of each io_uring read (bytes, or -errno) before the read engine does, and
  // returns what the engine shall see.
  virtual int read_completed(int fd, uint64_t offset, size_t size, int result);

  static System& real();
};

}  // namespace ferry::io
