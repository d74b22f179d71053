// Which request size and depth reads fastest here, and how that compares with dd, plain pread and
// safetensors' own loading in Python.
//
//   bench_io [--size BYTES] [--folder DIR] [--repeat N] [--piece BYTES] [--python PATH] [--json
//   FILE]
//
// Writes a temporary safetensors file of random bytes (default 1 GiB, in $TMPDIR or /tmp), drops it
// from the page cache before each run, and removes it at the end. All ways to read take turns, N
// times; then the engine, the fastest of the sweep, dd and Python do so anew, 2 N times. Prints the
// median and the best in GB/s (1e9) and the CPU seconds a run took. Reads go ticket by ticket, two
// pieces ahead, as a streamed forward's do. --python names an interpreter that has torch and
// safetensors.
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
#include <span>
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
  std::string python, json;
};

struct Result {
  double seconds = 0;
  double cpu_seconds = 0;
};

// Medians, and the rate of the fastest run.
struct Row {
  std::string what;
  double gb_per_s = 0;
  double best_gb_per_s = 0;
  double cpu_seconds = 0;
};

double cpu_seconds(int who) {
  rusage usage{};
  getrusage(who, &usage);
  auto to_s = [](timeval t) { return static_cast<double>(t.tv_sec) + t.tv_usec * 1e-6; };
  return to_s(usage.ru_utime) + to_s(usage.ru_stime);
}

// A way to read the file once.
struct Mode {
  std::string what;
  std::function<Result()> run;
  std::vector<Result> results = {};
};

Result timed(const std::function<void()>& run) {
  double cpu = cpu_seconds(RUSAGE_SELF) + cpu_seconds(RUSAGE_CHILDREN);
  auto begin = std::chrono::steady_clock::now();
  run();
  auto end = std::chrono::steady_clock::now();
  cpu = cpu_seconds(RUSAGE_SELF) + cpu_seconds(RUSAGE_CHILDREN) - cpu;
  return {std::chrono::duration<double>(end - begin).count(), cpu};
}

// Each in turn, `rounds` times: a shared disk drifts, and drifts for all.
void alternate(std::vector<Mode>& modes, const io::File& file, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    for (Mode& mode : modes) {
      file.drop_cache();
      mode.results.push_back(mode.run());
    }
  }
  for (Mode& mode : modes) {
    std::sort(mode.results.begin(), mode.results.end(),
              [](const Result& a, const Result& b) { return a.seconds < b.seconds; });
  }
}

Row row_of(const Mode& mode, uint64_t bytes) {
  auto rate = [&](const Result& one) { return static_cast<double>(bytes) / one.seconds / 1e9; };
  const Result& median = mode.results[mode.results.size() / 2];
  return {mode.what, rate(median), rate(mode.results.front()), median.cpu_seconds};
}

void print_row(const Row& row) {
  fmt::print("{:<44} {:6.2f} GB/s {:6.2f} best {:6.2f} CPU s\n", row.what, row.gb_per_s,
             row.best_gb_per_s, row.cpu_seconds);
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

void read_with_dd(const fs::path& path, const char* block) {
  pid_t child = ::fork();
  if (child == 0) {
    std::string in = "if=" + path.string();
    ::execlp("dd", "dd", in.c_str(), "of=/dev/null", block, "iflag=direct", "status=none", nullptr);
    ::_exit(127);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  if (status != 0) throw IoError("dd iflag=direct failed");
}

// Loads the file as Python does, `how` being "map" (load_file, and a copy, since mapping alone
// reads nothing) or "read" (all bytes, then load: diffusers' disable_mmap). Without the imports'
// time.
Result load_with_python(const std::string& python, const fs::path& path, const std::string& how) {
  const std::string script = fmt::format(
      "import resource, sys, time; from safetensors.torch import load, load_file\n"
      "cpu = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])\n"
      "begin, used = time.perf_counter(), cpu()\n"
      "if '{}' == 'map': kept = {{k: v.clone() for k, v in load_file('{}').items()}}\n"
      "else: kept = load(open('{}', 'rb').read())\n"
      "print(time.perf_counter() - begin, cpu() - used)",
      how, path.string(), path.string());
  FILE* pipe = ::popen(fmt::format("'{}' -c \"{}\"", python, script).c_str(), "r");
  Result result;
  bool read = pipe && std::fscanf(pipe, "%lf %lf", &result.seconds, &result.cpu_seconds) == 2;
  if (pipe) ::pclose(pipe);
  if (!read) throw_error<Error>("{}: cannot load a safetensors file", python);
  return result;
}

// A safetensors file of `size` bytes with tensors of 64 MiB at most.
void write_random(const fs::path& path, uint64_t size) {
  constexpr uint64_t kHeader = 4096;
  std::string header = "{";
  for (uint64_t at = 0; at < size - kHeader; at += 64_MiB) {
    uint64_t end = std::min<uint64_t>(at + 64_MiB, size - kHeader);
    header += fmt::format("{}\"t{}\":{{\"dtype\":\"U8\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
                          at ? "," : "", at / 64_MiB, end - at, at, end);
  }
  header += "}";
  if (header.size() > kHeader - 8) throw_error<ArgumentError>("--size is too large");
  header.resize(kHeader - 8, ' ');

  io::AtomicFile file(path);
  std::vector<uint64_t> block((8_MiB) / 8);
  std::mt19937_64 random(1);
  for (uint64_t& word : block) word = random();
  for (uint64_t at = 0; at < size; at += 8_MiB) {
    block[0] = at == 0 ? header.size() : at;
    if (at == 0) std::memcpy(block.data() + 1, header.data(), header.size());
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
    } else if (name == "--python") {
      options.python = argv[i + 1];
    } else if (name == "--json") {
      options.json = argv[i + 1];
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
  fmt::print("{} in {}, pieces of {}, alternating, median and best of {}, alignment {}\n",
             format_bytes(options.size_bytes), options.folder.string(),
             format_bytes(options.piece_bytes), options.repeat, file->direct_alignment());

  auto reads = [](const std::string& what, std::function<void()> read) {
    return Mode{what, [read = std::move(read)] { return timed(read); }};
  };
  auto engine = [&](const std::string& what, const io::ReadEngineOptions& engine_options) {
    return reads(what,
                 [&, engine_options] { read_with_engine(file, options, engine_options, buffer); });
  };
  std::vector<Mode> peers = {reads("dd iflag=direct bs=1M", [&] { read_with_dd(path, "bs=1M"); }),
                             reads("dd iflag=direct bs=64M", [&] { read_with_dd(path, "bs=64M"); }),
                             reads("pread through the page cache, 1 MiB", [&] {
                               read_with_pread(file->buffered_fd(), options, 1_MiB, buffer);
                             })};
  if (file->direct_fd() >= 0) {
    peers.push_back(reads("pread O_DIRECT, 1 thread, 1 MiB",
                          [&] { read_with_pread(file->direct_fd(), options, 1_MiB, buffer); }));
  }
  if (!options.python.empty()) {
    for (const std::string how : {"map", "read"}) {
      peers.push_back({fmt::format("safetensors in Python, {}", how), [&options, &path, how] {
                         return load_with_python(options.python, path, how);
                       }});
    }
  }
  io::ReadEngineOptions buffered;
  buffered.backend = io::ReadBackend::io_uring;
  buffered.direct = false;
  peers.push_back(engine("io_uring through the page cache, 64 x 1 MiB", buffered));

  std::vector<Mode> sweep;
  for (uint64_t request : {256_KiB, 512_KiB, 1_MiB, 2_MiB, 4_MiB}) {
    for (unsigned depth : {4u, 16u, 64u, 128u}) {
      io::ReadEngineOptions o;
      o.backend = io::ReadBackend::io_uring;
      o.request_bytes = request;
      o.queue_depth = depth;
      sweep.push_back(engine(fmt::format("io_uring, {} x {}", depth, format_bytes(request)), o));
    }
  }
  for (unsigned threads : {1u, 2u, 4u, 8u}) {
    io::ReadEngineOptions o;
    o.backend = io::ReadBackend::pread;
    o.pread_threads = threads;
    sweep.push_back(engine(fmt::format("pread pool, {} threads, 1 MiB", threads), o));
  }

  std::vector<Row> rows;
  auto show = [&](const std::vector<Mode>& modes) {
    for (const Mode& mode : modes) {
      rows.push_back(row_of(mode, options.size_bytes));
      print_row(rows.back());
    }
  };
  auto fastest = [&](const std::vector<Mode>& modes, const std::string& prefix) {
    const Mode* found = nullptr;
    for (const Mode& mode : modes) {
      if (!mode.what.starts_with(prefix)) continue;
      if (!found || row_of(mode, 1).gb_per_s > row_of(*found, 1).gb_per_s) found = &mode;
    }
    return found;
  };
  alternate(peers, *file, options.repeat);
  show(peers);
  alternate(sweep, *file, options.repeat);
  show(sweep);

  // Anew, side by side: the fastest of many is partly the luckiest.
  std::vector<Mode> last = {engine("the engine as it is by default", {})};
  for (const Mode* mode : {fastest(sweep, ""), fastest(peers, "dd iflag=direct bs=64M"),
                           fastest(peers, "safetensors")}) {
    if (mode) last.push_back({mode->what, mode->run});
  }
  fmt::print("\n");
  alternate(last, *file, 2 * options.repeat);
  show(last);
  const Row own = row_of(last.front(), options.size_bytes);
  for (const Mode& mode : std::span(last).subspan(1)) {
    const Row other = row_of(mode, options.size_bytes);
    fmt::print("engine / {}: {:.2f} (of the best {:.2f})\n", mode.what,
               own.gb_per_s / other.gb_per_s, own.best_gb_per_s / other.best_gb_per_s);
  }
  if (options.json.empty()) return;
  std::string json;
  for (const Row& row : rows) {
    json += fmt::format(
        "{} {{\"what\": \"{}\", \"gb_per_s\": {:.3f}, \"best_gb_per_s\": {:.3f}, \"cpu_s\": "
        "{:.3f}}}",
        json.empty() ? "" : ",\n", row.what, row.gb_per_s, row.best_gb_per_s, row.cpu_seconds);
  }
  io::write_file(options.json, std::string_view("[\n" + json + "\n]\n"));
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
