// An operating system that fails: the k-th operation on files goes wrong in a chosen way, or each
// read as a test decides.
#pragma once

#include <fcntl.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>

#include "ferry/io/system.h"

namespace ferry::testing {

enum class Fault {
  none,
  io_error,     // EIO
  try_again,    // EAGAIN, which is no error
  interrupted,  // EINTR, no error either
  short_read,   // a part of what was asked for, nor is that
  invalid,      // EINVAL, as from O_DIRECT where it is not supported
  slow,         // right, but late
  truncated,    // fstat sees a file that lost its second half
  changed,      // fstat sees another modification time
  disk_full,    // ENOSPC
};

// Counts the operations that can fail (fstat, reads, writes, fsync, rename) and lets the one with
// the number `at` fail, once. Thread-safe, but for the public members, which are set before.
class FaultySystem : public io::System {
 public:
  // What each read meets, by its number and whether it is a direct one. Set, it replaces arm() for
  // reads. Called by the threads that read.
  std::function<Fault(int64_t number, bool direct)> plan;
  // Short reads end at a multiple of this.
  size_t grain = 512;

  int open(const char* path, int flags, mode_t mode) override {
    const int fd = System::open(path, flags, mode);
    if ((flags & O_DIRECT) != 0) direct_fd_ = fd;
    return fd;
  }
  int64_t reads() const { return reads_; }
  void arm(Fault fault, int64_t at) {
    fault_ = fault;
    left_ = at;
    operations_ = 0;
    fired_ = false;
  }
  void disarm() { fault_ = Fault::none; }
  int64_t operations() const { return operations_; }
  bool fired() const { return fired_; }

  int fstat(int fd, struct stat* into) override {
    const int result = System::fstat(fd, into);
    switch (next(/*stat=*/true)) {
      case Fault::io_error:
        errno = EIO;
        return -1;
      case Fault::truncated:
        into->st_size /= 2;
        return result;
      case Fault::changed:
        into->st_mtim.tv_sec += 1;
        return result;
      default:
        return result;
    }
  }
  ssize_t pread(int fd, void* into, size_t size, uint64_t offset) override {
    const Fault fault = next_read(fd);
    if (fault == Fault::short_read) size = shortened(size);
    const ssize_t result = System::pread(fd, into, size, offset);
    const int failed = failure(fault);
    if (failed == 0) return result;
    errno = failed;
    return -1;
  }
  ssize_t write(int fd, const void* from, size_t size) override {
    if (const int failed = failure(next(false))) {
      errno = failed;
      return -1;
    }
    return System::write(fd, from, size);
  }
  int fsync(int fd) override { return fails() ? -1 : System::fsync(fd); }
  int rename(const char* from, const char* to) override {
    return fails() ? -1 : System::rename(from, to);
  }
  int read_completed(int fd, uint64_t offset, size_t size, int result) override {
    const Fault fault = next_read(fd);
    if (fault == Fault::short_read) return std::min(result, static_cast<int>(shortened(size)));
    const int failed = failure(fault);
    return failed == 0 ? result : -failed;
  }

 private:
  Fault next_read(int fd) { return plan ? plan(reads_++, fd == direct_fd_) : next(/*stat=*/false); }
  size_t shortened(size_t size) const {
    return size <= grain ? size : std::max(grain, size / 2 / grain * grain);
  }
  Fault next(bool stat) {
    ++operations_;
    if (fault_ == Fault::none || left_-- != 0) return Fault::none;
    const bool about_stat = fault_ == Fault::truncated || fault_ == Fault::changed;
    if (about_stat && !stat) {
      left_ = 0;  // the next fstat will do
      return Fault::none;
    }
    fired_ = true;
    if (fault_ == Fault::slow) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    return fault_;
  }
  static int failure(Fault fault) {
    switch (fault) {
      case Fault::io_error:
        return EIO;
      case Fault::try_again:
        return EAGAIN;
      case Fault::interrupted:
        return EINTR;
      case Fault::invalid:
        return EINVAL;
      case Fault::disk_full:
        return ENOSPC;
      default:
        return 0;
    }
  }
  bool fails() {
    const int failed = failure(next(false));
    errno = failed;
    return failed != 0;
  }

  std::atomic<Fault> fault_{Fault::none};
  std::atomic<int64_t> left_{0}, operations_{0}, reads_{0};
  std::atomic<int> direct_fd_{-1};
  std::atomic<bool> fired_{false};
};

}  // namespace ferry::testing
