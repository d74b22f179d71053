// io_uring: the consumer's own thread submits and reaps, no other thread is involved.
#include <liburing.h>
#include <poll.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <optional>
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
constexpr uint64_t kBarrier = ~uint64_t{0};

// Closes itself.
class Ring {
 public:
  // Throws IoError if it cannot be had.
  explicit Ring(unsigned entries) {
    int error = io_uring_queue_init(entries, &ring_, 0);
    if (error == 0) return;
    const char* hint = "";
    if (error == -EPERM) hint = " (seccomp or kernel.io_uring_disabled)";
    if (error == -ENOMEM) hint = " (memlock limit)";
    throw_error<IoError>("io_uring_setup refused: {}{}", std::strerror(-error), hint);
  }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;
  ~Ring() { io_uring_queue_exit(&ring_); }

  io_uring* get() { return &ring_; }
  int fd() const { return ring_.ring_fd; }

 private:
  io_uring ring_{};
};

class UringEngine final : public ReadEngine {
 public:
  UringEngine(const ReadEngineOptions& options, std::string reason)
      : options_(options),
        reason_(std::move(reason)),
        limiter_(options.rate_limit_bytes_per_s),
        slots_(options.queue_depth),
        rings_{Ring(options.queue_depth + 1), Ring(options.queue_depth + 1)} {  // and a barrier
    io_uring_probe* probe = io_uring_get_probe_ring(rings_[0].get());
    bool can_read = probe != nullptr && io_uring_opcode_supported(probe, IORING_OP_READ) != 0;
    io_uring_free_probe(probe);
    if (!can_read) throw IoError("this kernel's io_uring has no read operation (Linux 5.6 has)");
    for (unsigned i = 0; i < slots_.size(); ++i) free_.push_back(i);
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
    for (Ring& ring : rings_) {
      unsigned count = 0;
      while ((count = io_uring_peek_batch_cqe(ring.get(), batch, 64)) > 0) {
        for (unsigned i = 0; i < count; ++i) {
          const uint64_t index = io_uring_cqe_get_data64(batch[i]);
          if (index != kBarrier) complete(static_cast<unsigned>(index), batch[i]->res);
        }
        io_uring_cq_advance(ring.get(), count);
      }
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
    for (Ring& ring : rings_) {
      if (io_uring_sq_ready(ring.get()) == 0) continue;
      int result = 0;
      do {
        result = io_uring_submit(ring.get());
      } while (result == -EINTR);
      // EAGAIN, EBUSY: the kernel is short of memory or wants completions taken in first.
      if (result < 0 && result != -EAGAIN && result != -EBUSY) {
        throw_error<IoError>("io_uring_enter failed: {}", std::strerror(-result));
      }
    }
  }

  // The window has two halves, each with a ring of its own: when one is full the next reads go to
  // the other ring, behind a barrier that waits for the half before in that ring. The kernel does
  // that with nobody here awake, and the disk has always at least half a window before it; with one
  // ring it would run dry at each barrier.
  bool prepare(Chunk& chunk) {
    const uint64_t half_bytes = options_.window_bytes / 2;
    // Halves that began together would also end together.
    if (in_flight() == 0) half_used_ = half_bytes / 2;
    const bool full = half_bytes > 0 && half_used_ + chunk.next_size() > half_bytes;
    const size_t half = full ? 1 - half_ : half_;
    io_uring* ring = rings_[half].get();
    if (io_uring_sq_space_left(ring) < 2) return false;
    if (full) {
      // A barrier that is a read would itself be waited for by all behind it.
      io_uring_sqe* barrier = io_uring_get_sqe(ring);
      io_uring_prep_nop(barrier);
      io_uring_sqe_set_flags(barrier, IOSQE_IO_DRAIN);
      io_uring_sqe_set_data64(barrier, kBarrier);
      half_used_ = 0;
    }
    half_ = half;
    half_used_ += chunk.next_size();
    unsigned index = free_.back();
    free_.pop_back();
    io_uring_sqe* sqe = io_uring_get_sqe(ring);
    io_uring_prep_read(sqe, chunk.fd(), chunk.next_into(), static_cast<unsigned>(chunk.next_size()),
                       chunk.next_offset());
    io_uring_sqe_set_data64(sqe, index);
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
      if (in_flight() == 0 && !(limiter_.limited() && queue_.front())) continue;
      sleep();
    }
  }

  void sleep() {
    using std::chrono::nanoseconds;
    std::optional<nanoseconds> timeout;
    const std::shared_ptr<Ticket>& next = queue_.front();
    const auto refused = [](Ring& ring) { return io_uring_sq_ready(ring.get()) > 0; };
    if (std::any_of(rings_.begin(), rings_.end(), refused)) {
      // The kernel refused some for now; nothing may complete that would wake us.
      timeout = std::chrono::milliseconds(1);
    } else if (limiter_.limited() && next && !free_.empty()) {
      auto start = limiter_.start_of(next->next_size(options_.request_bytes));
      timeout = std::clamp<nanoseconds>(start - RateLimiter::Clock::now(), nanoseconds(0),
                                        std::chrono::seconds(1));
    }
    timespec limit{};
    if (timeout) limit = {timeout->count() / 1'000'000'000, timeout->count() % 1'000'000'000};
    std::array<pollfd, 2> completions = {pollfd{rings_[0].fd(), POLLIN, 0},
                                         pollfd{rings_[1].fd(), POLLIN, 0}};
    int result = ppoll(completions.data(), completions.size(), timeout ? &limit : nullptr, nullptr);
    if (result < 0 && errno != EINTR && errno != EAGAIN) {
      throw_error<IoError>("io_uring: waiting for reads failed: {}", std::strerror(errno));
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
  std::array<Ring, 2> rings_;
  size_t half_ = 0;         // of the window, that reads are added to
  uint64_t half_used_ = 0;  // of its bytes
};

}  // namespace

std::unique_ptr<ReadEngine> make_uring_engine(const ReadEngineOptions& options,
                                              std::string reason) {
  return std::make_unique<UringEngine>(options, std::move(reason));
}

}  // namespace ferry::io
