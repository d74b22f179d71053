#include "ferry/io/system.h"

#include <fcntl.h>
#include <unistd.h>

#include <cstdio>

namespace ferry::io {

int System::open(const char* path, int flags, mode_t mode) {
  return ::open(path, flags, mode);
}
int System::close(int fd) {
  return ::close(fd);
}
int System::fstat(int fd, struct stat* into) {
  return ::fstat(fd, into);
}
ssize_t System::pread(int fd, void* into, size_t size, uint64_t offset) {
  return ::pread(fd, into, size, static_cast<off_t>(offset));
}
ssize_t System::write(int fd, const void* from, size_t size) {
  return ::write(fd, from, size);
}
int System::fsync(int fd) {
  return ::fsync(fd);
}
int System::rename(const char* from, const char* to) {
  return ::rename(from, to);
}
int System::read_completed(int, uint64_t, size_t, int result) {
  return result;
}

System& System::real() {
  static System system;
  return system;
}

}  // namespace ferry::io
