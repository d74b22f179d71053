// io_uring: a thread of the engine's own submits and reaps, several reads each time it wakes.
#include <liburing.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <system_error>
#include <thread>
#include <vector>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/io/read_ticket.h"

namespace ferry::io {
namespace {

constexpr uint64_t kBell = ~uint64_t{0};
constexpr unsigned kAtOnce = 4;  // reads that go to the kernel in one call

// Closes itself.
class Ring {
 public:
  // Throws IoError if it cannot be had.
  explicit Ring(unsigned entries) {
    // Who submits is woken for completions, not interrupted by them (Linux 6.1). The ring belongs
    // to the thread that enables it.
    constexpr unsigned kOneThread =
        IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_R_DISABLED;
    int error = io_uring_queue_init(entries, &ring_, kOneThread);
    disabled_ = error == 0;
    if (error == -EINVAL) error = io_uring_queue_init(entries, &ring_, 0);
    if (error == 0) return;
    const char* hint = "";
    if (error == -EPERM) hint = " (seccomp or kernel.io_uring_disabled)";
    if (error == -ENOMEM) hint = " (memlock limit)";
    throw_error<IoError>("io_uring_setup refused: {}{}", std::strerror(-error), hint);
  }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;
  ~Ring() { io_uring_queue_exit(&ring_); }

  // From the thread that will submit.
  void enable() {
    // liburing 2.3 declares io_uring_enable_rings() and does not export it.
    if (disabled_)
      ::syscall(__NR_io_uring_register, ring_.ring_fd, IORING_REGISTER_ENABLE_RINGS, nullptr, 0);
  }
  io_uring* get() { return &ring_; }

 private:
  io_uring ring_{};
  bool disabled_ = false;
};

class UringEngine final : public ThreadedEngine {
 public:
  UringEngine(const ReadEngineOptions& options, std::string reason)
      : ThreadedEngine(options, std::move(reason)),
        slots_(options.queue_depth),
        ring_(options.queue_depth + 1) {  // and the bell
    io_uring_probe* probe = io_uring_get_probe_ring(ring_.get());
    const bool can_read = probe != nullptr && io_uring_opcode_supported(probe, IORING_OP_READ) != 0;
    io_uring_free_probe(probe);
    if (!can_read) throw IoError("this kernel's io_uring has no read operation (Linux 5.6 has)");
    for (unsigned i = 0; i < slots_.size(); ++i) free_.push_back(i);
    bell_ = ::eventfd(0, EFD_CLOEXEC);
    if (bell_ < 0) throw_error<IoError>("eventfd refused: {}", std::strerror(errno));
    try {
      start_thread([this] { work(); });
    } catch (const std::system_error& error) {
      ::close(bell_);
      throw_error<IoError>("io_uring: cannot start a thread: {}", error.what());
    }
  }

  ~UringEngine() override {
    // The kernel writes into the caller's memory until the last read has ended.
    stop();
    ::close(bell_);
  }

  ReadBackend backend() const override { return ReadBackend::io_uring; }

 private:
  // A chunk that the kernel has; free without a ticket.
  struct Slot {
    Chunk chunk;
    uint64_t begin = 0;  // of it, in all that was asked for
  };

  size_t in_flight() const { return slots_.size() - free_.size(); }

  // What start_locked() leaves: more that may start at once, room for more than was asked for, or
  // neither.
  enum class Rest { more, room, none };

  unsigned completions_to_await(Rest rest) const {
    if (rest == Rest::more) return 0;
    if (rest == Rest::room) return 1;
    // Waking costs those who compute, and a quarter of what is in flight may end before the disk
    // feels it.
    return static_cast<unsigned>(std::clamp<size_t>(in_flight() / 4, 1, 4));
  }

  void work() {
    ring_.enable();
    std::unique_lock lock(mutex_);
    while (true) {
      std::optional<RateLimiter::Clock::time_point> later;
      const Rest rest = start_locked(later);
      if (in_flight() == 0) {
        if (later) {
          work_.wait_until(lock, *later);
        } else if (!quit_) {
          work_.wait(lock);
        } else {
          return;
        }
        continue;
      }
      // While there is room, who leaves a ticket rings.
      listening_ = rest == Rest::room;
      if (listening_) ask_for_bell();
      const unsigned count = completions_to_await(rest);
      lock.unlock();
      const int error = submit_and_wait(count, later);
      lock.lock();
      listening_ = false;
      if (error < 0) refused_locked(error, lock);
      reap_locked();
    }
  }

  void ticket_came_locked() override {
    if (std::exchange(listening_, false)) ::eventfd_write(bell_, 1);
  }

  void ask_for_bell() {
    if (bell_asked_) return;
    io_uring_sqe* sqe = io_uring_get_sqe(ring_.get());
    if (sqe == nullptr) return;
    io_uring_prep_read(sqe, bell_, &bell_count_, sizeof(bell_count_), 0);
    io_uring_sqe_set_data64(sqe, kBell);
    bell_asked_ = true;
  }

  // 0, or -errno.
  int submit_and_wait(unsigned count, std::optional<RateLimiter::Clock::time_point> until) {
    int result = 0;
    if (until) {
      using std::chrono::nanoseconds;
      const auto span = std::clamp<nanoseconds>(*until - RateLimiter::Clock::now(), nanoseconds(0),
                                                std::chrono::seconds(1));
      __kernel_timespec limit{span.count() / 1'000'000'000, span.count() % 1'000'000'000};
      io_uring_cqe* first = nullptr;
      result = io_uring_submit_and_wait_timeout(ring_.get(), &first, 1, &limit, nullptr);
    } else {
      result = io_uring_submit_and_wait(ring_.get(), count);
    }
    return result == -ETIME || result == -EINTR ? 0 : std::min(result, 0);
  }

  static void refused_locked(int error, std::unique_lock<std::mutex>& lock) {
    // Anything else is a mistake of ours, and no way out is safe: reads that the kernel has may
    // write into memory long after who waits for them was told that they failed.
    if (error != -EAGAIN && error != -EBUSY) {
      log::error("io_uring_enter failed: {}; reads under way cannot be waited for",
                 std::strerror(-error));
      std::abort();
    }
    // Short of memory, or completions are to be taken in first.
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    lock.lock();
  }

  void reap_locked() {
    io_uring_cqe* batch[64];
    unsigned count = 0;
    while ((count = io_uring_peek_batch_cqe(ring_.get(), batch, 64)) > 0) {
      for (unsigned i = 0; i < count; ++i) {
        const uint64_t index = io_uring_cqe_get_data64(batch[i]);
        if (index < slots_.size()) complete_locked(static_cast<unsigned>(index), batch[i]->res);
        if (index == kBell) bell_asked_ = false;
      }
      io_uring_cq_advance(ring_.get(), count);
    }
  }

  void complete_locked(unsigned index, int result) {
    Slot& slot = slots_[index];
    Chunk& chunk = slot.chunk;
    result = chunk.request->file->system().read_completed(chunk.fd(), chunk.next_offset(),
                                                          chunk.next_size(), result);
    if (ended_locked(chunk, result)) {
      slot = {};
      free_.push_back(index);
    } else {
      prepare(index);
    }
  }

  // Prepares the next reads that may start, a few at a time: the disk sees none of those that go to
  // the kernel in one call before the last is ready, which takes long where memory is new. `later`
  // is set if it is the rate that holds the next one back.
  Rest start_locked(std::optional<RateLimiter::Clock::time_point>& later) {
    const Slot* oldest = nullptr;
    for (const Slot& slot : slots_) {
      if (slot.chunk.ticket && (oldest == nullptr || slot.begin < oldest->begin)) oldest = &slot;
    }
    for (unsigned started = 0; !free_.empty(); ++started) {
      const std::optional<uint64_t> size = next_size_locked();
      if (!size) return Rest::room;
      const bool is_behind = oldest != nullptr && oldest->chunk.ticket != next_ticket_locked();
      if (options_.window_bytes > 0 && is_behind &&
          asked_bytes_ + *size - oldest->begin > window_behind(*oldest->chunk.ticket)) {
        break;
      }
      if (started == kAtOnce) return Rest::more;
      later = when_locked(*size);
      if (later) break;
      const unsigned index = free_.back();
      free_.pop_back();
      slots_[index] = {next_locked(), asked_bytes_};
      asked_bytes_ += *size;
      if (oldest == nullptr) oldest = &slots_[index];
      prepare(index);
    }
    return Rest::none;
  }

  // In whole tickets like the first (see window_bytes): a virtual disk tells of all that it has at
  // the end, and who waits for a ticket of which the last piece did not fit waits for the next
  // window as well. A ticket beyond the window ends beside few reads of others for the same reason.
  uint64_t window_behind(const Ticket& first) const {
    const uint64_t window = options_.window_bytes;
    const uint64_t size = first.size_bytes();
    if (size > window) return window / 4;
    if (size > window / 8 * 5) return size;
    return std::max<uint64_t>((window / 4 * 3 + size / 2) / size, 2) * size;
  }

  void prepare(unsigned index) {
    const Chunk& chunk = slots_[index].chunk;
    io_uring_sqe* sqe = io_uring_get_sqe(ring_.get());
    io_uring_prep_read(sqe, chunk.fd(), chunk.next_into(), static_cast<unsigned>(chunk.next_size()),
                       chunk.next_offset());
    io_uring_sqe_set_data64(sqe, index);
  }

  std::vector<Slot> slots_;  // by index, which travels as the read's user data
  std::vector<unsigned> free_;
  uint64_t asked_bytes_ = 0;
  bool listening_ = false;
  int bell_ = -1;
  uint64_t bell_count_ = 0;
  bool bell_asked_ = false;
  Ring ring_;
};

}  // namespace

std::unique_ptr<ReadEngine> make_uring_engine(const ReadEngineOptions& options,
                                              std::string reason) {
  return std::make_unique<UringEngine>(options, std::move(reason));
}

}  // namespace ferry::io
