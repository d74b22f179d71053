// Which request size and depth reads fastest here, and how that compares with dd and plain pread.
//
//   bench_io [--size BYTES] [--folder DIR] [--repeat N] [--piece BYTES]
//
// Writes a temporary file of random bytes (default 1 GiB, in $TMPDIR or /tmp), drops it from the
// page cache before each run, prints the median of N runs in GB/s (1e9) and the CPU seconds a run
// took, and removes the file. Reads go ticket by ticket, two pieces ahead, as a streamed forward's
// do.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/base/units.h"
#include "ferry/io/atomic_file.h"
#include "ferry/io/read_engine.h"

namespace {

using namespace ferry;
namespace fs = std::filesystem;

struct Options {
  uint64_t size_bytes = 1_GiB;
  uint64_t piece_bytes = 64_MiB;
  int repeat = 3;
  fs::path folder = fs::temp_directory_path();
};

struct Result {
  double seconds = 0;
  double cpu_seconds = 0;
};

double cpu_seconds(int who) {
  rusage usage{};
  getrusage(who, &usage);
  auto to_s = [](timeval t) { return static_cast<double>(t.tv_sec) + t.tv_usec * 1e-6; };
  return to_s(usage.ru_utime) + to_s(usage.ru_stime);
}

Result timed(const io::File& file, int repeat, const std::function<void()>& run) {
  std::vector<Result> results;
  for (int i = 0; i < repeat; ++i) {
    file.drop_cache();
    double cpu = cpu_seconds(RUSAGE_SELF) + cpu_seconds(RUSAGE_CHILDREN);
    auto begin = std::chrono::steady_clock::now();
    run();
    auto end = std::chrono::steady_clock::now();
    cpu = cpu_seconds(RUSAGE_SELF) + cpu_seconds(RUSAGE_CHILDREN) - cpu;
    results.push_back({std::chrono::duration<double>(end - begin).count(), cpu});
  }
  std::sort(results.begin(), results.end(),
            [](const Result& a, const Result& b) { return a.seconds < b.seconds; });
  return results[results.size() / 2];
}

void print_row(const std::string& what, uint64_t bytes, const Result& result) {
  fmt::print("{:<44} {:6.2f} GB/s {:6.2f} CPU s\n", what,
             static_cast<double>(bytes) / result.seconds / 1e9, result.cpu_seconds);
  std::fflush(stdout);
}

void read_with_engine(const std::shared_ptr<const io::File>& file, const Options& options,
                      const io::ReadEngineOptions& engine_options, io::AlignedBuffer& buffer) {
  constexpr size_t kAhead = 2;
  auto engine = io::make_read_engine(engine_options);
  std::deque<io::ReadTicketPtr> tickets;
  size_t slots = buffer.size_bytes() / options.piece_bytes;
  size_t slot = 0;
  for (uint64_t at = 0; at < options.size_bytes; at += options.piece_bytes) {
    if (tickets.size() == std::min(slots, kAhead)) {
      engine->wait(tickets.front());
      tickets.pop_front();
    }
    uint64_t size = std::min(options.piece_bytes, options.size_bytes - at);
    tickets.push_back(
        engine->submit({{file, at, size, size, buffer.data() + slot * options.piece_bytes}}));
    slot = (slot + 1) % slots;
  }
  for (const io::ReadTicketPtr& ticket : tickets) engine->wait(ticket);
}

void read_with_pread(int fd, const Options& options, size_t request, io::AlignedBuffer& buffer) {
  for (uint64_t at = 0; at < options.size_bytes; at += request) {
    ssize_t n =
        ::pread(fd, buffer.data() + at % options.piece_bytes, request, static_cast<off_t>(at));
    if (n <= 0) throw_error<IoError>("pread: {}", std::strerror(errno));
  }
}

void read_with_dd(const fs::path& path) {
  pid_t child = ::fork();
  if (child == 0) {
    std::string in = "if=" + path.string();
    ::execlp("dd", "dd", in.c_str(), "of=/dev/null", "bs=1M", "iflag=direct", "status=none",
             nullptr);
    ::_exit(127);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  if (status != 0) throw IoError("dd iflag=direct failed");
}

void write_random(const fs::path& path, uint64_t size) {
  io::AtomicFile file(path);
  std::vector<uint64_t> block((8_MiB) / 8);
  std::mt19937_64 random(1);
  for (uint64_t& word : block) word = random();
  for (uint64_t at = 0; at < size; at += 8_MiB) {
    block[0] = at;
    file.write(std::as_bytes(std::span(block)).first(std::min<uint64_t>(8_MiB, size - at)));
  }
  file.commit();
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; i += 2) {
    std::string name = argv[i];
    if (i + 1 >= argc) throw_error<ArgumentError>("{} needs a value", name);
    if (name == "--size") {
      options.size_bytes = parse_bytes(argv[i + 1], name) / 8_MiB * 8_MiB;
    } else if (name == "--piece") {
      options.piece_bytes = std::max<uint64_t>(parse_bytes(argv[i + 1], name) / 4_MiB, 1) * 4_MiB;
    } else if (name == "--folder") {
      options.folder = argv[i + 1];
    } else if (name == "--repeat") {
      options.repeat = std::max(1, std::atoi(argv[i + 1]));
    } else {
      throw_error<ArgumentError>("unknown option {}", name);
    }
  }
  return options;
}

struct RemoveAtExit {
  fs::path path;
  ~RemoveAtExit() {
    std::error_code ignored;
    fs::remove(path, ignored);
  }
};

void run(const Options& options) {
  fs::path path = options.folder / fmt::format("ferry-bench-io-{}", ::getpid());
  RemoveAtExit cleanup{path};
  write_random(path, options.size_bytes);
  auto file = io::File::open(path);
  io::AlignedBuffer buffer(2 * options.piece_bytes);
  std::memset(buffer.data(), 1, buffer.size_bytes());
  fmt::print("{} in {}, pieces of {}, median of {}, alignment {}\n",
             format_bytes(options.size_bytes), options.folder.string(),
             format_bytes(options.piece_bytes), options.repeat, file->direct_alignment());

  print_row("dd iflag=direct bs=1M", options.size_bytes,
            timed(*file, options.repeat, [&] { read_with_dd(path); }));
  if (file->direct_fd() >= 0) {
    print_row("pread O_DIRECT, 1 thread, 1 MiB", options.size_bytes,
              timed(*file, options.repeat,
                    [&] { read_with_pread(file->direct_fd(), options, 1_MiB, buffer); }));
  }
  print_row("pread through the page cache, 1 MiB", options.size_bytes,
            timed(*file, options.repeat,
                  [&] { read_with_pread(file->buffered_fd(), options, 1_MiB, buffer); }));

  auto engine_row = [&](const std::string& what, const io::ReadEngineOptions& engine_options) {
    print_row(what, options.size_bytes, timed(*file, options.repeat, [&] {
                read_with_engine(file, options, engine_options, buffer);
              }));
  };
  for (uint64_t request : {256_KiB, 512_KiB, 1_MiB, 2_MiB, 4_MiB}) {
    for (unsigned depth : {4u, 16u, 64u, 128u}) {
      io::ReadEngineOptions o;
      o.backend = io::ReadBackend::io_uring;
      o.request_bytes = request;
      o.queue_depth = depth;
      engine_row(fmt::format("io_uring, {} x {}", depth, format_bytes(request)), o);
    }
  }
  io::ReadEngineOptions buffered;
  buffered.backend = io::ReadBackend::io_uring;
  buffered.direct = false;
  engine_row("io_uring through the page cache, 64 x 1 MiB", buffered);
  for (unsigned threads : {1u, 2u, 4u, 8u}) {
    io::ReadEngineOptions o;
    o.backend = io::ReadBackend::pread;
    o.pread_threads = threads;
    engine_row(fmt::format("pread pool, {} threads, 1 MiB", threads), o);
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    ferry::log::set_level(ferry::log::Level::warn);
    run(parse(argc, argv));
    return 0;
  } catch (const ferry::ArgumentError& error) {
    fmt::print(stderr, "bench_io: {}\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    fmt::print(stderr, "bench_io: {}\n", error.what());
    return 1;
  }
}
