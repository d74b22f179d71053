// io_uring: the consumer's own thread submits and reaps, no other thread is involved.
#include <liburing.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/io/read_ticket.h"

namespace ferry::io {
namespace {

// A chunk in flight. Slots are addressed by index, which travels as the request's user data.
struct Slot {
  Chunk chunk;
  bool used = false;
};

class UringEngine final : public ReadEngine {
 public:
  UringEngine(const ReadEngineOptions& options, std::string reason)
      : options_(options), limiter_(options.rate_limit_bytes_per_s), slots_(options.queue_depth) {
    int error = io_uring_queue_init(options.queue_depth, &ring_, 0);
    if (error < 0) {
      const char* hint = "";
      if (error == -EPERM) hint = " (seccomp or kernel.io_uring_disabled)";
      if (error == -ENOMEM) hint = " (memlock limit)";
      throw_error<IoError>("io_uring_setup refused: {}{}", std::strerror(-error), hint);
    }
    io_uring_probe* probe = io_uring_get_probe_ring(&ring_);
    bool can_read = probe != nullptr && io_uring_opcode_supported(probe, IORING_OP_READ) != 0;
    io_uring_free_probe(probe);
    if (!can_read) {
      io_uring_queue_exit(&ring_);
      throw IoError("this kernel's io_uring has no read operation (Linux 5.6 has)");
    }
    for (unsigned i = 0; i < slots_.size(); ++i) free_.push_back(i);
    reason_ = std::move(reason);
  }

  ~UringEngine() override {
    // The kernel writes into the caller's memory until the last read has ended.
    for (const auto& ticket : queue_.all()) ticket->cancel();
    for (const Slot& slot : slots_) {
      if (slot.used) slot.chunk.ticket->cancel();
    }
    try {
      drain([this] { return in_flight() == 0 && again_.empty(); });
    } catch (const std::exception& error) {
      log::error("io_uring: {}", error.what());
    }
    io_uring_queue_exit(&ring_);
  }

  ReadTicketPtr submit(std::vector<ReadRequest> requests) override {
    auto ticket = std::make_shared<Ticket>(std::move(requests), options_.direct);
    if (ticket->done()) return ticket;
    if (!queue_.front()) limiter_.begin(RateLimiter::Clock::now());
    queue_.push(ticket);
    poll();
    return ticket;
  }

  void poll() override {
    reap();
    start();
  }

  void wait(const ReadTicketPtr& ticket) override {
    auto& mine = static_cast<Ticket&>(*ticket);
    poll();
    drain([&mine] { return mine.done(); });
    mine.rethrow();
  }

  void cancel(const ReadTicketPtr& ticket) override {
    auto& mine = static_cast<Ticket&>(*ticket);
    mine.cancel();
    drain([&mine] { return mine.done(); });
  }

  ReadBackend backend() const override { return ReadBackend::io_uring; }
  const std::string& reason() const override { return reason_; }
  uint64_t bytes_read() const override { return bytes_read_; }

 private:
  size_t in_flight() const { return slots_.size() - free_.size(); }

  // Takes in all completions that are there. The completion ring is shared memory: looking into an
  // empty one costs no system call.
  void reap() {
    io_uring_cqe* batch[64];
    unsigned count = 0;
    while ((count = io_uring_peek_batch_cqe(&ring_, batch, 64)) > 0) {
      for (unsigned i = 0; i < count; ++i) {
        complete(static_cast<unsigned>(io_uring_cqe_get_data64(batch[i])), batch[i]->res);
      }
      io_uring_cq_advance(&ring_, count);
    }
  }

  void complete(unsigned index, int result) {
    Chunk chunk = std::move(slots_[index].chunk);
    slots_[index] = {};
    free_.push_back(index);
    result = chunk.request->file->system().read_completed(chunk.fd(), chunk.next_offset(),
                                                          chunk.next_size(), result);
    uint64_t arrived = 0;
    std::string error;
    ChunkResult outcome = take_result(chunk, result, arrived, error);
    bytes_read_ += arrived;
    Ticket& ticket = *chunk.ticket;
    if (outcome == ChunkResult::again && !ticket.stopped()) {
      again_.push_back(std::move(chunk));
      return;
    }
    if (outcome == ChunkResult::failed) ticket.fail(std::move(error));
    ticket.chunk_ended();
  }

  // Starts what there is room for. All of it goes to the kernel in one call.
  void start() {
    drop_stopped();
    while (!free_.empty() && !again_.empty()) {
      if (!prepare(again_.back())) break;
      again_.pop_back();
    }
    while (!free_.empty()) {
      const std::shared_ptr<Ticket>& ticket = queue_.front();
      if (!ticket) break;
      if (limiter_.limited()) {
        uint64_t bytes = ticket->next_size(options_.request_bytes);
        if (RateLimiter::Clock::now() < limiter_.start_of(bytes)) break;
        limiter_.take(bytes);
      }
      std::shared_ptr<Ticket> self = ticket;
      Chunk chunk = self->next(self, options_.request_bytes);
      if (!prepare(chunk)) {
        again_.push_back(std::move(chunk));
        break;
      }
    }
    flush();
  }

  // Hands prepared requests to the kernel. What it does not take now, it takes at the next call.
  void flush() {
    if (io_uring_sq_ready(&ring_) == 0) return;
    int result = 0;
    do {
      result = io_uring_submit(&ring_);
    } while (result == -EINTR);
    // EAGAIN, EBUSY: the kernel is short of memory or wants completions taken in first.
    if (result < 0 && result != -EAGAIN && result != -EBUSY) {
      throw_error<IoError>("io_uring_enter failed: {}", std::strerror(-result));
    }
  }

  bool prepare(Chunk& chunk) {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    if (sqe == nullptr) return false;
    unsigned index = free_.back();
    free_.pop_back();
    io_uring_prep_read(sqe, chunk.fd(), chunk.next_into(), static_cast<unsigned>(chunk.next_size()),
                       chunk.next_offset());
    io_uring_sqe_set_data64(sqe, index);
    // The kernel starts it when all before it have ended, with nobody here awake.
    if (options_.window_bytes > 0 && (window_used_ += chunk.next_size()) > options_.window_bytes) {
      io_uring_sqe_set_flags(sqe, IOSQE_IO_DRAIN);
      window_used_ = chunk.next_size();
    }
    slots_[index] = {std::move(chunk), true};
    return true;
  }

  void drop_stopped() {
    for (size_t i = 0; i < again_.size();) {
      if (!again_[i].ticket->stopped()) {
        ++i;
        continue;
      }
      again_[i].ticket->chunk_ended();
      again_[i] = std::move(again_.back());
      again_.pop_back();
    }
  }

  // Works until `finished()`, asleep in the kernel while there is nothing to do.
  template <class F>
  void drain(F finished) {
    while (true) {
      reap();
      if (finished()) return;
      start();
      if (finished()) return;
      if (io_uring_cq_ready(&ring_) > 0) continue;
      if (in_flight() == 0 && !(limiter_.limited() && queue_.front())) continue;
      sleep();
    }
  }

  void sleep() {
    io_uring_cqe* cqe = nullptr;
    int result = 0;
    const std::shared_ptr<Ticket>& next = queue_.front();
    if (io_uring_sq_ready(&ring_) > 0) {
      // The kernel refused some for now; nothing may complete that would wake us.
      __kernel_timespec timeout{.tv_sec = 0, .tv_nsec = 1'000'000};
      result = io_uring_wait_cqe_timeout(&ring_, &cqe, &timeout);
    } else if (limiter_.limited() && next && !free_.empty()) {
      auto start = limiter_.start_of(next->next_size(options_.request_bytes));
      auto left =
          std::chrono::duration_cast<std::chrono::nanoseconds>(start - RateLimiter::Clock::now())
              .count();
      left = std::clamp<decltype(left)>(left, 0, 1'000'000'000);
      __kernel_timespec timeout{.tv_sec = left / 1'000'000'000, .tv_nsec = left % 1'000'000'000};
      result = io_uring_wait_cqe_timeout(&ring_, &cqe, &timeout);
    } else {
      result = io_uring_wait_cqe(&ring_, &cqe);
    }
    if (result < 0 && result != -EINTR && result != -ETIME && result != -EAGAIN) {
      throw_error<IoError>("io_uring: waiting for reads failed: {}", std::strerror(-result));
    }
  }

  const ReadEngineOptions options_;
  std::string reason_;
  RateLimiter limiter_;
  TicketQueue queue_;
  std::vector<Chunk> again_;  // to be issued once more
  std::vector<Slot> slots_;
  std::vector<unsigned> free_;
  uint64_t bytes_read_ = 0;
  uint64_t window_used_ = 0;
  io_uring ring_{};
};

}  // namespace

std::unique_ptr<ReadEngine> make_uring_engine(const ReadEngineOptions& options,
                                              std::string reason) {
  return std::make_unique<UringEngine>(options, std::move(reason));
}

}  // namespace ferry::io
