#include "ferry/io/read_ticket.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "ferry/base/error.h"
#include "ferry/base/log.h"

namespace ferry::io {
namespace {

// Reads that made no progress at all, in a row, before a chunk fails.
constexpr unsigned kMaxRetries = 1000;

bool fits_direct(const ReadRequest& request) {
  if (request.file->direct_fd() < 0) return false;
  uint64_t all = request.offset | request.size_bytes | reinterpret_cast<uintptr_t>(request.into);
  return all % request.file->direct_alignment() == 0;
}

void log_direct_refused(const Chunk& chunk) {
  static std::atomic<bool> logged{false};
  if (logged.exchange(true)) return;
  log::info("{}: O_DIRECT refused at offset {} (EINVAL), reading through the page cache",
            chunk.request->file->path().string(), chunk.next_offset());
}

// What sched_setattr(2) takes; not all C libraries declare it.
struct SchedulingAttributes {
  uint32_t size = sizeof(SchedulingAttributes);
  uint32_t policy = 0;
  uint64_t flags = 0;
  int32_t nice = 0;
  uint32_t priority = 0;
  uint64_t runtime_ns = 0, deadline_ns = 0, period_ns = 0;
};

// A reading thread works for microseconds and sleeps. On cores that compute it would wait for its
// turn up to a tick each time, and the disk with it; Linux lets those go first that ask for short
// turns (6.12; older ones ignore it). Needs no privilege.
void ask_for_short_turns() noexcept {
  SchedulingAttributes attributes;
  if (::syscall(SYS_sched_getattr, 0, &attributes, sizeof(attributes), 0) != 0) return;
  if (attributes.policy != SCHED_OTHER) return;
  attributes.runtime_ns = 100'000;
  ::syscall(SYS_sched_setattr, 0, &attributes, 0);
}

}  // namespace

Ticket::Ticket(std::vector<ReadRequest> requests, bool direct)
    : requests_(std::move(requests)), direct_(direct) {
  for (ReadRequest& request : requests_) {
    if (!request.file) throw_error<ArgumentError>("read request without a file");
    if (request.min_bytes == 0) request.min_bytes = request.size_bytes;
    if (request.into == nullptr && request.size_bytes > 0) {
      throw_error<ArgumentError>("{}: read request without memory", request.file->path().string());
    }
    if (request.min_bytes > request.size_bytes ||
        request.offset > static_cast<uint64_t>(INT64_MAX) - request.size_bytes) {
      throw_error<ArgumentError>("{}: read request of {} bytes at offset {}, at least {}",
                                 request.file->path().string(), request.size_bytes, request.offset,
                                 request.min_bytes);
    }
    size_bytes_ += request.size_bytes;
  }
  skip_empty();
  update_done();
}

void Ticket::skip_empty() {
  while (index_ < requests_.size() && position_ >= requests_[index_].size_bytes) {
    ++index_;
    position_ = 0;
  }
}

uint64_t Ticket::next_size(uint64_t chunk_bytes) const {
  const ReadRequest& request = requests_[index_];
  // Chunks end where memory has a multiple of their size: of those that share a huge page of new
  // memory, each would clear it.
  const auto into = reinterpret_cast<uintptr_t>(request.into + position_);
  return std::min(chunk_bytes - into % chunk_bytes, request.size_bytes - position_);
}

Chunk Ticket::next(const std::shared_ptr<Ticket>& self, uint64_t chunk_bytes) {
  const ReadRequest& request = requests_[index_];
  Chunk chunk;
  chunk.ticket = self;
  chunk.request = &request;
  chunk.offset = request.offset + position_;
  chunk.size_bytes = next_size(chunk_bytes);
  uint64_t needed = request.min_bytes > position_ ? request.min_bytes - position_ : 0;
  chunk.min_bytes = std::min(chunk.size_bytes, needed);
  chunk.into = request.into + position_;
  chunk.direct = direct_ && fits_direct(request);
  position_ += chunk.size_bytes;
  skip_empty();
  ++in_flight_;
  return chunk;
}

void Ticket::update_done() {
  if (in_flight_ == 0 && !has_next()) done_.store(true, std::memory_order_release);
}

void Ticket::chunk_ended() {
  --in_flight_;
  update_done();
}

void Ticket::fail(std::string error) {
  if (error_.empty()) error_ = std::move(error);
}

void Ticket::cancel() {
  // A ticket whose reads all ended keeps its outcome.
  if (done()) return;
  cancelled_ = true;
  update_done();
}

void Ticket::rethrow() const {
  if (!error_.empty()) throw IoError(error_);
  if (cancelled_) throw Cancelled();
}

ChunkResult take_result(Chunk& chunk, int64_t result, uint64_t& arrived, std::string& error) {
  arrived = 0;
  auto describe = [&] {
    return fmt::format("{}: read of {} bytes at offset {}", chunk.request->file->path().string(),
                       chunk.size_bytes, chunk.offset);
  };
  if (result < 0) {
    int reason = static_cast<int>(-result);
    bool transient = reason == EINTR || reason == EAGAIN;
    if (transient && ++chunk.retries <= kMaxRetries) return ChunkResult::again;
    if (reason == EINVAL && chunk.direct) {
      log_direct_refused(chunk);
      chunk.direct = false;
      return ChunkResult::again;
    }
    error = fmt::format("{} failed: {}; got {} bytes, expected at least {}", describe(),
                        std::strerror(reason), chunk.done_bytes, chunk.min_bytes);
    return ChunkResult::failed;
  }
  arrived = static_cast<uint64_t>(result);
  chunk.done_bytes += arrived;
  if (chunk.done_bytes >= chunk.min_bytes) return ChunkResult::complete;
  if (arrived == 0) {
    error = fmt::format(
        "{} got {} bytes, expected at least {}: the file ends there (it had {} bytes when it was "
        "opened). Was it truncated or is it still being written?",
        describe(), chunk.done_bytes, chunk.min_bytes, chunk.request->file->size_bytes());
    return ChunkResult::failed;
  }
  chunk.retries = 0;
  // The rest no longer begins where O_DIRECT could.
  if (chunk.done_bytes % chunk.request->file->direct_alignment() != 0) chunk.direct = false;
  return ChunkResult::again;
}

const std::shared_ptr<Ticket>& TicketQueue::front() {
  while (!tickets_.empty() && !tickets_.front()->has_next()) tickets_.pop_front();
  return tickets_.empty() ? none_ : tickets_.front();
}

void RateLimiter::begin(Clock::time_point now) {
  next_ = std::max(next_, now);
}

RateLimiter::Clock::time_point RateLimiter::start_of(uint64_t bytes) const {
  if (!limited()) return next_;
  auto span = std::chrono::duration<double>(static_cast<double>(bytes) / rate_);
  return next_ + std::chrono::duration_cast<Clock::duration>(span);
}

ThreadedEngine::ThreadedEngine(const ReadEngineOptions& options, std::string reason)
    : options_(options), reason_(std::move(reason)), limiter_(options.rate_limit_bytes_per_s) {}

void ThreadedEngine::start_thread(std::function<void()> work) {
  // Signals are for the program's own threads.
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    threads_.emplace_back([work = std::move(work)] {
      ask_for_short_turns();
      work();
    });
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void ThreadedEngine::stop() {
  {
    std::lock_guard lock(mutex_);
    quit_ = true;
    for (const auto& ticket : queue_.all()) ticket->cancel();
    for (const auto& ticket : reading_) ticket->cancel();
  }
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

ReadTicketPtr ThreadedEngine::submit(std::vector<ReadRequest> requests) {
  auto ticket = std::make_shared<Ticket>(std::move(requests), options_.direct);
  if (ticket->done()) return ticket;
  {
    std::lock_guard lock(mutex_);
    if (!queue_.front()) limiter_.begin(RateLimiter::Clock::now());
    queue_.push(ticket);
    note_time_locked();
    ticket_came_locked();
  }
  work_.notify_all();
  return ticket;
}

void ThreadedEngine::wait(const ReadTicketPtr& ticket) {
  auto& mine = static_cast<Ticket&>(*ticket);
  std::unique_lock lock(mutex_);
  ended_.wait(lock, [&mine] { return mine.done(); });
  mine.rethrow();
}

void ThreadedEngine::cancel(const ReadTicketPtr& ticket) {
  auto& mine = static_cast<Ticket&>(*ticket);
  std::unique_lock lock(mutex_);
  mine.cancel();
  note_time_locked();
  ended_.wait(lock, [&mine] { return mine.done(); });
}

ReadTime ThreadedEngine::read_time() const {
  std::lock_guard lock(mutex_);
  const std::chrono::duration<double> now = RateLimiter::Clock::now() - noted_;
  return {busy_s_ + (busy_ ? now.count() : 0), bytes_read_};
}

void ThreadedEngine::note_time_locked() {
  const auto now = RateLimiter::Clock::now();
  if (busy_) busy_s_ += std::chrono::duration<double>(now - noted_).count();
  noted_ = now;
  busy_ = !reading_.empty() || queue_.front() != nullptr;
}

std::optional<uint64_t> ThreadedEngine::next_size_locked() {
  const std::shared_ptr<Ticket>& ticket = next_ticket_locked();
  if (!ticket) return std::nullopt;
  return ticket->next_size(options_.request_bytes);
}

std::optional<RateLimiter::Clock::time_point> ThreadedEngine::when_locked(uint64_t bytes) {
  if (!limiter_.limited()) return std::nullopt;
  const auto start = limiter_.start_of(bytes);
  if (RateLimiter::Clock::now() < start) return start;
  limiter_.take(bytes);
  return std::nullopt;
}

Chunk ThreadedEngine::next_locked() {
  std::shared_ptr<Ticket> ticket = next_ticket_locked();
  reading_.push_back(ticket);
  return ticket->next(ticket, options_.request_bytes);
}

bool ThreadedEngine::ended_locked(Chunk& chunk, int64_t result) {
  uint64_t arrived = 0;
  std::string error;
  const ChunkResult outcome = take_result(chunk, result, arrived, error);
  bytes_read_ += arrived;
  Ticket& ticket = *chunk.ticket;
  if (outcome == ChunkResult::failed) ticket.fail(std::move(error));
  if (outcome == ChunkResult::again && !ticket.stopped()) return false;
  reading_.erase(std::find(reading_.begin(), reading_.end(), chunk.ticket));
  ticket.chunk_ended();
  note_time_locked();
  if (ticket.done()) ended_.notify_all();
  return true;
}

}  // namespace ferry::io
