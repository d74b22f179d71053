// An operating system that fails: the k-th operation on files goes wrong in a chosen way.
#pragma once

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <thread>

#include "ferry/io/system.h"

namespace ferry::testing {

enum class Fault {
  none,
  io_error,    // EIO
  try_again,   // EAGAIN, which is no error
  short_read,  // half of what was asked for, which is no error either
  slow,        // right, but late
  truncated,   // fstat sees a file that lost its second half
  changed,     // fstat sees another modification time
  disk_full,   // ENOSPC
};

// Counts the operations that can fail (fstat, reads, writes, fsync, rename) and lets the one with
// the number `at` fail, once. Thread-safe.
class FaultySystem : public io::System {
 public:
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
    const Fault fault = next(/*stat=*/false);
    if (fault == Fault::short_read) size = (size + 1) / 2;
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
    const Fault fault = next(false);
    if (fault == Fault::short_read && result > 1) return result / 2;
    const int failed = failure(fault);
    return failed == 0 ? result : -failed;
  }

 private:
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
  std::atomic<int64_t> left_{0}, operations_{0};
  std::atomic<bool> fired_{false};
};

}  // namespace ferry::testing
