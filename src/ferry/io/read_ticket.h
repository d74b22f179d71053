// What the read engines share: tickets, the chunks they are cut into, and what a chunk's result
// means. Internal to io/.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "ferry/io/read_engine.h"

namespace ferry::io {

class Ticket;

// One request to the kernel: part of a ReadRequest.
struct Chunk {
  std::shared_ptr<Ticket> ticket;
  const ReadRequest* request = nullptr;  // in the ticket
  uint64_t offset = 0;                   // in the file
  uint64_t size_bytes = 0;
  uint64_t min_bytes = 0;   // that have to arrive
  uint64_t done_bytes = 0;  // that arrived in earlier, short reads
  std::byte* into = nullptr;
  bool direct = false;
  unsigned retries = 0;

  int fd() const { return direct ? request->file->direct_fd() : request->file->buffered_fd(); }
  uint64_t next_offset() const { return offset + done_bytes; }
  uint64_t next_size() const { return size_bytes - done_bytes; }
  std::byte* next_into() const { return into + done_bytes; }
};

// The ticket of both engines. done() may be asked from any thread; the rest is guarded by the
// engine's mutex.
class Ticket final : public ReadTicket {
 public:
  // Throws ArgumentError for a request without file or memory.
  explicit Ticket(std::vector<ReadRequest> requests, bool direct);

  bool done() const override { return done_.load(std::memory_order_acquire); }

  // Of all its requests.
  uint64_t size_bytes() const { return size_bytes_; }
  // Whether chunks are left that nobody took; none after a failure or a cancellation.
  bool has_next() const { return !stopped() && index_ < requests_.size(); }
  // Bytes of the chunk that next() will cut.
  uint64_t next_size(uint64_t chunk_bytes) const;
  // Cuts the next chunk and counts it as in flight.
  Chunk next(const std::shared_ptr<Ticket>& self, uint64_t chunk_bytes);

  void chunk_ended();
  void fail(std::string error);
  void cancel();
  bool stopped() const { return cancelled_ || !error_.empty(); }
  // Throws what went wrong, if anything did.
  void rethrow() const;

 private:
  void update_done();
  void skip_empty();

  std::vector<ReadRequest> requests_;
  bool direct_;
  uint64_t size_bytes_ = 0;
  size_t index_ = 0;       // of the request that the next chunk comes from
  uint64_t position_ = 0;  // in that request
  uint64_t in_flight_ = 0;
  bool cancelled_ = false;
  std::string error_;
  std::atomic<bool> done_{false};
};

enum class ChunkResult { complete, again, failed };

// Takes in the result of a read (bytes, or -errno): `again` if the chunk has to be issued once more
// (short read, interruption, O_DIRECT refused), `failed` after the ticket was told why.
// `arrived` is set to the bytes that this read brought.
ChunkResult take_result(Chunk& chunk, int64_t result, uint64_t& arrived, std::string& error);

// The tickets that have chunks to start, first come first served.
class TicketQueue {
 public:
  void push(std::shared_ptr<Ticket> ticket) { tickets_.push_back(std::move(ticket)); }
  // The first ticket with a chunk left, or null; drops those that have none.
  const std::shared_ptr<Ticket>& front();
  void clear() { tickets_.clear(); }
  const std::deque<std::shared_ptr<Ticket>>& all() const { return tickets_; }

 private:
  std::deque<std::shared_ptr<Ticket>> tickets_;
  std::shared_ptr<Ticket> none_;
};

// Paces reads to an average rate. While work waits, unused time is credited, so that a thread that
// looks late still gets the rate of a disk that reads all the time; idle time is not. A read starts
// when a disk of that rate would have finished it, so the rate is never exceeded.
class RateLimiter {
 public:
  using Clock = std::chrono::steady_clock;
  explicit RateLimiter(uint64_t bytes_per_s) : rate_(static_cast<double>(bytes_per_s)) {}

  bool limited() const { return rate_ > 0; }
  // Work begins to wait after none did.
  void begin(Clock::time_point now);
  // When a read of `bytes` may start.
  Clock::time_point start_of(uint64_t bytes) const;
  // Accounts for a read that starts.
  void take(uint64_t bytes) { next_ = start_of(bytes); }

 private:
  double rate_;
  Clock::time_point next_{};
};

// What both engines are: consumers leave tickets, threads of the engine's own read their chunks.
class ThreadedEngine : public ReadEngine {
 public:
  ReadTicketPtr submit(std::vector<ReadRequest> requests) override;
  void wait(const ReadTicketPtr& ticket) override;
  void cancel(const ReadTicketPtr& ticket) override;
  const std::string& reason() const override { return reason_; }
  ReadTime read_time() const override;

 protected:
  ThreadedEngine(const ReadEngineOptions& options, std::string reason);

  // Throws std::system_error.
  void start_thread(std::function<void()> work);
  // Drops what has not started and waits for the threads. Each engine's destructor calls it.
  void stop();

  // What the chunk that comes next is of; null where nothing waits.
  const std::shared_ptr<Ticket>& next_ticket_locked() { return queue_.front(); }
  // Its size, and none where nothing waits. REQUIRES of the others: there is one.
  std::optional<uint64_t> next_size_locked();
  // When the rate allows it, if that is later; else it counts as begun.
  std::optional<RateLimiter::Clock::time_point> when_locked(uint64_t bytes);
  Chunk next_locked();
  // Takes in a read's result: bytes, or -errno. False if the chunk has to be read on.
  bool ended_locked(Chunk& chunk, int64_t result);
  // A ticket was left.
  virtual void ticket_came_locked() {}

  const ReadEngineOptions options_;
  mutable std::mutex mutex_;
  std::condition_variable work_;  // a ticket came, or quit_
  bool quit_ = false;             // guarded by mutex_

 private:
  // To be called where a read may have been asked for or have ended.
  void note_time_locked();

  const std::string reason_;
  std::condition_variable ended_;  // a ticket is done
  RateLimiter limiter_;            // guarded by mutex_, as are those below
  TicketQueue queue_;
  std::vector<std::shared_ptr<Ticket>> reading_;  // once for each chunk in flight
  uint64_t bytes_read_ = 0;
  double busy_s_ = 0;  // until noted_
  bool busy_ = false;  // since noted_
  RateLimiter::Clock::time_point noted_{};
  std::vector<std::thread> threads_;
};

// Engines; throw IoError if they cannot be had. `reason` tells what is used and why.
std::unique_ptr<ReadEngine> make_pread_engine(const ReadEngineOptions& options, std::string reason);
std::unique_ptr<ReadEngine> make_uring_engine(const ReadEngineOptions& options, std::string reason);

}  // namespace ferry::io
