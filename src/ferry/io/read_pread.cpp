// A pool of threads in pread(): the fallback where io_uring is refused.
#include <cerrno>
#include <system_error>

#include "ferry/base/error.h"
#include "ferry/io/read_ticket.h"

namespace ferry::io {
namespace {

class PreadEngine final : public ThreadedEngine {
 public:
  PreadEngine(const ReadEngineOptions& options, std::string reason)
      : ThreadedEngine(options, std::move(reason)) {
    for (unsigned i = 0; i < options.pread_threads; ++i) {
      try {
        start_thread([this] { work(); });
      } catch (const std::system_error& error) {
        // Fewer threads do; none does not.
        if (i == 0) throw_error<IoError>("pread pool: cannot start a thread: {}", error.what());
        break;
      }
    }
  }

  ~PreadEngine() override { stop(); }

  ReadBackend backend() const override { return ReadBackend::pread; }

 private:
  void work() {
    std::unique_lock lock(mutex_);
    while (!quit_) {
      const std::optional<uint64_t> size = next_size_locked();
      if (!size) {
        work_.wait(lock);
        continue;
      }
      // The queue may change meanwhile, so look again whatever woke us.
      if (auto later = when_locked(*size)) {
        work_.wait_until(lock, *later);
        continue;
      }
      read(next_locked(), lock);
    }
  }

  // Reads one chunk to its end, with the lock given up during the system calls.
  void read(Chunk chunk, std::unique_lock<std::mutex>& lock) {
    const File& file = *chunk.request->file;
    int64_t result = 0;
    do {
      lock.unlock();
      ssize_t n = file.system().pread(chunk.fd(), chunk.next_into(), chunk.next_size(),
                                      chunk.next_offset());
      result = n < 0 ? -static_cast<int64_t>(errno) : n;
      lock.lock();
    } while (!ended_locked(chunk, result));
  }
};

}  // namespace

std::unique_ptr<ReadEngine> make_pread_engine(const ReadEngineOptions& options,
                                              std::string reason) {
  return std::make_unique<PreadEngine>(options, std::move(reason));
}

}  // namespace ferry::io
