// A pool of threads in pread(): the fallback where io_uring is refused.
#include <pthread.h>
#include <signal.h>

#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "ferry/base/error.h"
#include "ferry/io/read_ticket.h"

namespace ferry::io {
namespace {

class PreadEngine final : public ReadEngine {
 public:
  PreadEngine(const ReadEngineOptions& options, std::string reason)
      : options_(options), reason_(std::move(reason)), limiter_(options.rate_limit_bytes_per_s) {
    // Signals are for the program's own threads.
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (unsigned i = 0; i < options.pread_threads; ++i)
        threads_.emplace_back([this] { work(); });
    } catch (const std::system_error& error) {
      // Fewer threads do; none does not.
      if (threads_.empty()) {
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        throw_error<IoError>("pread pool: cannot start a thread: {}", error.what());
      }
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  ~PreadEngine() override {
    {
      std::lock_guard lock(mutex_);
      quit_ = true;
      for (const auto& ticket : queue_.all()) ticket->cancel();
      for (const auto& ticket : reading_) ticket->cancel();
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  ReadTicketPtr submit(std::vector<ReadRequest> requests) override {
    auto ticket = std::make_shared<Ticket>(std::move(requests), options_.direct);
    if (ticket->done()) return ticket;
    {
      std::lock_guard lock(mutex_);
      if (!queue_.front()) limiter_.begin(RateLimiter::Clock::now());
      queue_.push(ticket);
    }
    work_.notify_all();
    return ticket;
  }

  void poll() override {}

  void wait(const ReadTicketPtr& ticket) override {
    auto& mine = static_cast<Ticket&>(*ticket);
    std::unique_lock lock(mutex_);
    ended_.wait(lock, [&mine] { return mine.done(); });
    mine.rethrow();
  }

  void cancel(const ReadTicketPtr& ticket) override {
    auto& mine = static_cast<Ticket&>(*ticket);
    std::unique_lock lock(mutex_);
    mine.cancel();
    ended_.wait(lock, [&mine] { return mine.done(); });
  }

  ReadBackend backend() const override { return ReadBackend::pread; }
  const std::string& reason() const override { return reason_; }
  uint64_t bytes_read() const override { return bytes_read_.load(std::memory_order_relaxed); }

 private:
  void work() {
    std::unique_lock lock(mutex_);
    while (true) {
      const std::shared_ptr<Ticket>& front = queue_.front();
      if (quit_) return;
      if (!front) {
        work_.wait(lock);
        continue;
      }
      if (limiter_.limited()) {
        uint64_t bytes = front->next_size(options_.request_bytes);
        auto start = limiter_.start_of(bytes);
        if (RateLimiter::Clock::now() < start) {
          // The queue may change meanwhile, so look again whatever woke us.
          work_.wait_until(lock, start);
          continue;
        }
        limiter_.take(bytes);
      }
      std::shared_ptr<Ticket> ticket = front;
      Chunk chunk = ticket->next(ticket, options_.request_bytes);
      reading_.push_back(ticket);
      read(chunk, lock);
      std::erase_if(reading_, [&, erased = false](const auto& other) mutable {
        return !erased && other == ticket && (erased = true);
      });
      ticket->chunk_ended();
      if (ticket->done()) ended_.notify_all();
    }
  }

  // Reads one chunk to its end, with the lock given up during the system calls.
  void read(Chunk& chunk, std::unique_lock<std::mutex>& lock) {
    Ticket& ticket = *chunk.ticket;
    const File& file = *chunk.request->file;
    while (!ticket.stopped()) {
      lock.unlock();
      ssize_t n = file.system().pread(chunk.fd(), chunk.next_into(), chunk.next_size(),
                                      chunk.next_offset());
      int64_t result = n < 0 ? -static_cast<int64_t>(errno) : n;
      uint64_t arrived = 0;
      std::string error;
      ChunkResult outcome = take_result(chunk, result, arrived, error);
      lock.lock();
      bytes_read_.fetch_add(arrived, std::memory_order_relaxed);
      if (outcome == ChunkResult::failed) ticket.fail(std::move(error));
      if (outcome != ChunkResult::again) return;
    }
  }

  const ReadEngineOptions options_;
  const std::string reason_;
  std::atomic<uint64_t> bytes_read_{0};

  std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable ended_;
  RateLimiter limiter_;  // guarded by mutex_, as are those below
  TicketQueue queue_;
  std::vector<std::shared_ptr<Ticket>> reading_;  // once for each chunk being read
  bool quit_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<ReadEngine> make_pread_engine(const ReadEngineOptions& options,
                                              std::string reason) {
  return std::make_unique<PreadEngine>(options, std::move(reason));
}

}  // namespace ferry::io
