// Which request size and depth reads fastest here, and how that compares with dd, plain pread and
// safetensors' own loading in Python.
//
//   bench_io [--size BYTES] [--folder DIR] [--repeat N] [--piece BYTES] [--python PATH] [--json
//   FILE]
//
// Writes a temporary safetensors file of random bytes (default 1 GiB, in $TMPDIR or /tmp), drops it
// from the page cache before each run, prints the median of N runs in GB/s (1e9) and the CPU
// seconds a run took, and removes the file. Reads go ticket by ticket, two pieces ahead, as a
// streamed forward's do. --python names an interpreter that has torch and safetensors.
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
  std::string python, json;
};

struct Result {
  double seconds = 0;
  double cpu_seconds = 0;
};

struct Row {
  std::string what;
  double gb_per_s = 0;
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

Row print_row(const std::string& what, uint64_t bytes, const Result& result) {
  Row row{what, static_cast<double>(bytes) / result.seconds / 1e9, result.cpu_seconds};
  fmt::print("{:<44} {:6.2f} GB/s {:6.2f} CPU s\n", row.what, row.gb_per_s, row.cpu_seconds);
  std::fflush(stdout);
  return row;
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
Result load_with_python(const std::string& python, const fs::path& path, const std::string& how,
                        const io::File& file, int repeat) {
  const std::string script = fmt::format(
      "import resource, sys, time; from safetensors.torch import load, load_file\n"
      "cpu = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])\n"
      "begin, used = time.perf_counter(), cpu()\n"
      "if '{}' == 'map': kept = {{k: v.clone() for k, v in load_file('{}').items()}}\n"
      "else: kept = load(open('{}', 'rb').read())\n"
      "print(time.perf_counter() - begin, cpu() - used)",
      how, path.string(), path.string());
  std::vector<Result> results;
  for (int i = 0; i < repeat; ++i) {
    file.drop_cache();
    FILE* pipe = ::popen(fmt::format("'{}' -c \"{}\"", python, script).c_str(), "r");
    Result result;
    bool read = pipe && std::fscanf(pipe, "%lf %lf", &result.seconds, &result.cpu_seconds) == 2;
    if (pipe) ::pclose(pipe);
    if (!read) throw_error<Error>("{}: cannot load a safetensors file", python);
    results.push_back(result);
  }
  std::sort(results.begin(), results.end(),
            [](const Result& a, const Result& b) { return a.seconds < b.seconds; });
  return results[results.size() / 2];
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
  fmt::print("{} in {}, pieces of {}, median of {}, alignment {}\n",
             format_bytes(options.size_bytes), options.folder.string(),
             format_bytes(options.piece_bytes), options.repeat, file->direct_alignment());

  std::vector<Row> rows;
  auto add = [&](const std::string& what, const std::function<void()>& read) {
    rows.push_back(print_row(what, options.size_bytes, timed(*file, options.repeat, read)));
    return rows.back().gb_per_s;
  };
  add("dd iflag=direct bs=1M", [&] { read_with_dd(path, "bs=1M"); });
  const double dd = add("dd iflag=direct bs=64M", [&] { read_with_dd(path, "bs=64M"); });
  if (file->direct_fd() >= 0) {
    add("pread O_DIRECT, 1 thread, 1 MiB",
        [&] { read_with_pread(file->direct_fd(), options, 1_MiB, buffer); });
  }
  add("pread through the page cache, 1 MiB",
      [&] { read_with_pread(file->buffered_fd(), options, 1_MiB, buffer); });
  double python = 0;
  if (!options.python.empty()) {
    for (const std::string how : {"map", "read"}) {
      Result result = load_with_python(options.python, path, how, *file, options.repeat);
      rows.push_back(
          print_row(fmt::format("safetensors in Python, {}", how), options.size_bytes, result));
      python = std::max(python, rows.back().gb_per_s);
    }
  }

  auto engine_row = [&](const std::string& what, const io::ReadEngineOptions& engine_options) {
    return add(what, [&] { read_with_engine(file, options, engine_options, buffer); });
  };
  const double engine = engine_row("the engine as it is by default", {});
  double best = 0;
  for (uint64_t request : {256_KiB, 512_KiB, 1_MiB, 2_MiB, 4_MiB}) {
    for (unsigned depth : {4u, 16u, 64u, 128u}) {
      io::ReadEngineOptions o;
      o.backend = io::ReadBackend::io_uring;
      o.request_bytes = request;
      o.queue_depth = depth;
      best = std::max(
          best, engine_row(fmt::format("io_uring, {} x {}", depth, format_bytes(request)), o));
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
    best = std::max(best, engine_row(fmt::format("pread pool, {} threads, 1 MiB", threads), o));
  }
  // Both ends of the sweep, since a shared disk drifts.
  const double again = engine_row("the engine as it is by default, again", {});
  const double mean = (engine + again) / 2;
  fmt::print(
      "engine / best of the sweep {:.2f}, engine / dd bs=64M {:.2f}, best / dd bs=64M {:.2f}",
      mean / best, mean / dd, best / dd);
  if (python > 0) fmt::print(", engine / safetensors in Python {:.2f}", mean / python);
  fmt::print("\n");
  if (options.json.empty()) return;
  std::string json;
  for (const Row& row : rows) {
    json += fmt::format("{} {{\"what\": \"{}\", \"gb_per_s\": {:.3f}, \"cpu_s\": {:.3f}}}",
                        json.empty() ? "" : ",\n", row.what, row.gb_per_s, row.cpu_seconds);
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
