// Reads with many requests in flight: io_uring with O_DIRECT where it works, a pread pool
// elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "ferry/io/file.h"

namespace ferry::io {

// One contiguous range of a file into memory. Read with O_DIRECT if offset, size and address are
// all multiples of file->direct_alignment() (and the file has a direct descriptor), else through
// the page cache. `size` may reach past the end of the file by less than the alignment: at least
// `min_bytes` have to arrive, or the ticket fails; what lies behind them in the file may be
// missing. 0 stands for all of `size_bytes`.
struct ReadRequest {
  std::shared_ptr<const File> file;
  uint64_t offset = 0;
  uint64_t size_bytes = 0;
  uint64_t min_bytes = 0;
  std::byte* into = nullptr;
};

// The outcome of one submit(). Shared between engine and consumer; an error lives here until
// wait().
class ReadTicket {
 public:
  virtual ~ReadTicket() = default;
  // True once all reads ended, well or not. No blocking, no system call.
  virtual bool done() const = 0;
};
using ReadTicketPtr = std::shared_ptr<ReadTicket>;

// How long an engine had reads to do, and what arrived meanwhile.
struct ReadTime {
  double seconds = 0;
  uint64_t bytes = 0;
  // Bytes a second; 0: too short to tell.
  double rate() const { return seconds > 0.01 ? static_cast<double>(bytes) / seconds : 0; }
  ReadTime& operator+=(const ReadTime& other) {
    seconds += other.seconds;
    bytes += other.bytes;
    return *this;
  }
  // Since `earlier`, of the same engine.
  ReadTime since(const ReadTime& earlier) const {
    return {seconds - earlier.seconds, bytes - earlier.bytes};
  }
};

enum class ReadBackend { automatic, io_uring, pread };

struct ReadEngineOptions {
  ReadBackend backend = ReadBackend::automatic;
  // Bytes of one request to the kernel; larger ranges are split where memory has a multiple of it.
  // Default: what bench/io found about as fast as any, and few enough that the kernel's part does
  // not slow who computes (with 512 KiB it took 4% of two busy cores, with this 2%).
  uint64_t request_bytes = 2 << 20;
  // Requests in flight at once.
  unsigned queue_depth = 64;
  // With io_uring nothing of other tickets is asked of the kernel that lies so many bytes behind
  // the first read that has not ended, in the order of asking. A disk serves all that it is given
  // side by side, and a virtual one may tell of none before it has served all: without this,
  // whoever waits for the first of many tickets waits for nearly all. Behind a smaller ticket it is
  // about three quarters of it in whole tickets of that size, but two, or one where two are more
  // than five quarters of it; behind the end of a larger one a quarter. 0: no order.
  uint64_t window_bytes = 32 << 20;
  // Threads of the pread pool.
  unsigned pread_threads = 4;
  // Use O_DIRECT where possible. Off reads through the page cache (right when it holds the model).
  bool direct = true;
  // Upper limit in bytes a second over all reads; 0 is none. For planning and benches.
  uint64_t rate_limit_bytes_per_s = 0;
};

// Reads on threads of its own: with io_uring one that sleeps until several reads have ended.
// Thread-safe. Destroying the engine waits until the kernel no longer writes into any buffer.
class ReadEngine {
 public:
  virtual ~ReadEngine() = default;

  // Queues the requests as one ticket. Never waits for I/O.
  // The buffers must stay until the ticket is done (also after cancel()).
  virtual ReadTicketPtr submit(std::vector<ReadRequest> requests) = 0;
  // Blocks until the ticket is done. Throws its IoError: file, offset, got, expected; or Cancelled.
  virtual void wait(const ReadTicketPtr& ticket) = 0;
  // Drops what has not started, and returns once nothing of the ticket writes any more.
  virtual void cancel(const ReadTicketPtr& ticket) = 0;

  virtual ReadBackend backend() const = 0;
  // Why this backend ("io_uring with O_DIRECT: available", "pread: io_uring_setup refused: EPERM").
  virtual const std::string& reason() const = 0;
  // While anything was asked for and had not ended, since construction. Its rate is the disk's, or
  // that of the limit.
  virtual ReadTime read_time() const = 0;
  // Bytes that arrived since construction.
  uint64_t bytes_read() const { return read_time().bytes; }
};

// Makes an engine; `automatic` tries io_uring and falls back to pread, and logs which and why.
// Throws IoError if a forced backend cannot be had. FERRY_READ_BACKEND=io_uring|pread overrides
// `automatic`.
std::unique_ptr<ReadEngine> make_read_engine(const ReadEngineOptions& options = {});

// Memory aligned for direct I/O (and to 64 bytes at least), from mmap for large sizes so that it
// goes back to the system when freed.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t size_bytes, size_t alignment = 4096);
  ~AlignedBuffer();
  AlignedBuffer(AlignedBuffer&& other) noexcept;
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept;

  std::byte* data() const { return data_; }
  size_t size_bytes() const { return size_; }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace ferry::io
