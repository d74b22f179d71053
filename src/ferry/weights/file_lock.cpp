#include "ferry/weights/file_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "ferry/base/error.h"

namespace ferry::weights {

std::optional<FileLock> FileLock::attempt(const std::filesystem::path& path) {
  while (true) {
    int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0)
      throw_error<IoError>("{}: cannot open the lock: {}", path.string(), std::strerror(errno));
    FileLock lock(path, fd);
    while (::flock(fd, LOCK_EX | LOCK_NB) != 0) {
      if (errno == EWOULDBLOCK) return std::nullopt;
      if (errno != EINTR)
        throw_error<IoError>("{}: cannot lock: {}", path.string(), std::strerror(errno));
    }
    // Whoever held it may have removed the file: then this lock is on nothing.
    struct stat held {
    }, named{};
    if (::fstat(fd, &held) == 0 && ::stat(path.c_str(), &named) == 0 &&
        held.st_dev == named.st_dev && held.st_ino == named.st_ino)
      return lock;
  }
}

FileLock FileLock::wait(const std::filesystem::path& path, const StopToken& stop) {
  // Polled, so that a stop is noticed.
  constexpr auto kInterval = std::chrono::milliseconds(20);
  while (true) {
    if (auto lock = attempt(path)) return std::move(*lock);
    stop.throw_if_stopped();
    std::this_thread::sleep_for(kInterval);
  }
}

FileLock::FileLock(FileLock&& other) noexcept
    : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)) {}

FileLock::~FileLock() {
  if (fd_ >= 0) ::close(fd_);
}

void FileLock::remove_file() {
  ::unlink(path_.c_str());
}

}  // namespace ferry::weights
