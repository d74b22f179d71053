#include "ferry/io/read_engine.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <set>
#include <string_view>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/io/read_ticket.h"

namespace ferry::io {
namespace {

// Direct I/O wants whole blocks, so ranges are cut at multiples of this.
constexpr uint64_t kChunkUnit = 4096;
// A read's size has to fit the kernel's int.
constexpr uint64_t kMaxChunk = 1u << 30;

ReadEngineOptions checked(ReadEngineOptions options) {
  options.request_bytes =
      std::clamp<uint64_t>(options.request_bytes / kChunkUnit * kChunkUnit, kChunkUnit, kMaxChunk);
  options.queue_depth = std::clamp(options.queue_depth, 1u, 4096u);
  options.pread_threads = std::clamp(options.pread_threads, 1u, 256u);
  return options;
}

ReadBackend requested_backend(ReadBackend option) {
  if (option != ReadBackend::automatic) return option;
  const char* variable = std::getenv("FERRY_READ_BACKEND");
  std::string_view name = variable == nullptr ? "" : variable;
  if (name.empty() || name == "automatic" || name == "auto") return ReadBackend::automatic;
  if (name == "io_uring") return ReadBackend::io_uring;
  if (name == "pread") return ReadBackend::pread;
  throw_error<ArgumentError>("FERRY_READ_BACKEND is \"{}\", expected io_uring, pread or automatic",
                             name);
}

// Each reason once a process: engines come and go.
void log_once(const std::string& reason) {
  static std::mutex mutex;
  static std::set<std::string> seen;
  std::lock_guard lock(mutex);
  if (seen.insert(reason).second) log::info("reads: {}", reason);
}

std::string describe_mode(const ReadEngineOptions& options) {
  return options.direct ? "with O_DIRECT where the file system takes it" : "through the page cache";
}

// The one place that decides; value and reason leave together.
std::unique_ptr<ReadEngine> choose(const ReadEngineOptions& options, ReadBackend wanted) {
  std::string why_not;
  if (wanted != ReadBackend::pread) {
#ifdef FERRY_WITH_URING
    try {
      return make_uring_engine(
          options, fmt::format("io_uring {}: {}", describe_mode(options),
                               wanted == ReadBackend::automatic ? "available" : "requested"));
    } catch (const IoError& error) {
      why_not = error.what();
    }
#else
    why_not = "built without io_uring (FERRY_WITH_URING)";
#endif
    if (wanted == ReadBackend::io_uring) {
      throw_error<IoError>("io_uring was requested and cannot be had: {}", why_not);
    }
  } else {
    why_not = "requested";
  }
  return make_pread_engine(options,
                           fmt::format("pread with {} threads {}: {}", options.pread_threads,
                                       describe_mode(options), why_not));
}

}  // namespace

std::unique_ptr<ReadEngine> make_read_engine(const ReadEngineOptions& options) {
  std::unique_ptr<ReadEngine> engine = choose(checked(options), requested_backend(options.backend));
  log_once(engine->reason());
  return engine;
}

}  // namespace ferry::io
