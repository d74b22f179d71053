// ferry doctor: what this machine offers for running models, and what to do about what is missing.
#include <ATen/Parallel.h>
#include <dlfcn.h>
#include <torch/version.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>

#include "command.h"
#include "ferry/base/error.h"
#include "ferry/base/system_info.h"
#include "ferry/base/units.h"
#include "ferry/io/read_engine.h"
#include "ferry/tensor/device.h"

namespace ferry::cli {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

struct DoctorOptions {
  std::string folder;
  std::optional<uint64_t> test_bytes;
  bool json = false;
};

// Removes the test file however the command ends.
struct TestFile {
  fs::path path;
  ~TestFile() {
    std::error_code ignored;
    fs::remove(path, ignored);
  }
};

// Bytes a second with which `file` arrives, with the engine's own way of reading.
double read_rate(io::ReadEngine& engine, const std::shared_ptr<const io::File>& file,
                 uint64_t bytes, const StopToken& stop) {
  constexpr uint64_t kBlock = 16 << 20;
  io::AlignedBuffer buffers[2] = {io::AlignedBuffer(kBlock), io::AlignedBuffer(kBlock)};
  io::ReadTicketPtr tickets[2];
  auto start = std::chrono::steady_clock::now();
  int turn = 0;
  for (uint64_t offset = 0; offset + kBlock <= bytes; offset += kBlock, turn ^= 1) {
    stop.throw_if_stopped();
    if (tickets[turn]) engine.wait(tickets[turn]);
    tickets[turn] = engine.submit({{file, offset, kBlock, kBlock, buffers[turn].data()}});
  }
  for (auto& ticket : tickets) {
    if (ticket) engine.wait(ticket);
  }
  double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return static_cast<double>(bytes / kBlock * kBlock) / seconds;
}

// The largest safetensors file below `folder` that is large enough to measure with, or a test file.
Json measure_disk(const DoctorOptions& options, const StopToken& stop) {
  uint64_t bytes = options.test_bytes.value_or(256 << 20);
  fs::path file;
  std::error_code ignored;
  for (auto it = fs::recursive_directory_iterator(
           options.folder, fs::directory_options::skip_permission_denied, ignored);
       it != fs::recursive_directory_iterator(); it.increment(ignored)) {
    if (it.depth() > 4) it.disable_recursion_pending();
    if (it->path().extension() == ".safetensors" && it->is_regular_file(ignored) &&
        it->file_size(ignored) >= bytes) {
      file = it->path();
      break;
    }
  }
  TestFile made;
  if (file.empty()) {
    if (access(options.folder.c_str(), W_OK) != 0) {
      return {
          {"problem",
           "no safetensors file large enough to measure with, and the folder cannot be written"}};
    }
    made.path = file = fs::path(options.folder) / fmt::format(".ferry-doctor-{}", getpid());
    std::ofstream out(file, std::ios::binary);
    std::vector<char> block(1 << 20, 'f');
    for (uint64_t written = 0; written < bytes; written += block.size()) {
      stop.throw_if_stopped();
      for (size_t i = 0; i < block.size(); i += 512)
        block[i] = static_cast<char>((written >> 20) + i / 512);
      out.write(block.data(), static_cast<std::streamsize>(block.size()));
    }
    out.close();
    if (!out)
      throw_error<IoError>("{}: cannot write a test file of {} (a full disk?)", file.string(),
                           format_bytes(bytes));
    sync();
  }
  auto opened = io::File::open(file);
  auto engine = io::make_read_engine();
  opened->drop_cache();
  double rate = read_rate(*engine, opened, bytes, stop);
  return {{"folder", options.folder},
          {"read_bytes_per_s", static_cast<uint64_t>(rate)},
          {"direct_io", opened->direct_fd() >= 0},
          {"alignment", opened->direct_alignment()}};
}

// What is there, or why nothing is; with what to do about it where something can be done.
Json accelerator_report(std::vector<std::string>& advice) {
  const tensor::Accelerator& found = tensor::open_accelerator();
  Json report = {{"found", found.found()}, {"reason", found.reason}};
  if (!found.device_names.empty()) report["devices"] = found.device_names;
  if (found.driver_version > 0) {
    report["cuda_driver"] =
        fmt::format("{}.{}", found.driver_version / 1000, found.driver_version % 1000 / 10);
  }
  if (!found.library.empty()) report["library"] = found.library.string();
  using Status = tensor::AcceleratorStatus;
  if (!found.found() && found.status != Status::no_driver && found.status != Status::disabled)
    advice.push_back("no accelerator: " + found.reason);
  return report;
}

std::string libtorch_path() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&at::get_num_threads), &info) != 0 && info.dli_fname)
    return info.dli_fname;
  return "";
}

int run_doctor(const DoctorOptions& given, Context& context) {
  DoctorOptions options = given;
  if (options.folder.empty()) options.folder = ".";
  if (!fs::is_directory(options.folder)) throw_error<IoError>("{}: no such folder", options.folder);
  CpuInfo cpu = cpu_info();
  MemoryInfo memory = memory_info();
  auto engine = io::make_read_engine();

  std::vector<std::string> advice;
  bool fast_bf16 = cpu.has("avx512_bf16") || cpu.has("amx_bf16");
  if (!fast_bf16)
    advice.push_back(
        "this CPU has no fast bf16: ferry computes bf16 weights in float32, which is slower");
  if (engine->backend() != io::ReadBackend::io_uring) {
    advice.push_back("reads go through a thread pool instead of io_uring (" + engine->reason() +
                     "); in a container, allow io_uring in its seccomp profile");
  }
  if (memory.usable_bytes() < (2ull << 30)) {
    advice.push_back(fmt::format("only {} of memory is free: use --weights-memory",
                                 format_bytes(memory.usable_bytes())));
  }
  Json disk = measure_disk(options, context.stop);
  if (disk.contains("direct_io") && !disk["direct_io"].get<bool>()) {
    advice.push_back(
        "this folder's file system has no direct I/O: streaming goes through the page cache");
  }
  if (disk.value("read_bytes_per_s", uint64_t{1} << 40) < 500'000'000) {
    advice.push_back(
        "this disk reads slowly; streaming will wait for it. Put the model on a faster one if "
        "there is one");
  }
  Json device = accelerator_report(advice);
  Json report = {
      {"ferry", FERRY_VERSION},
      {"libtorch", {{"version", TORCH_VERSION}, {"path", libtorch_path()}}},
      {"cpu",
       {{"model", cpu.model},
        {"logical_cores", cpu.logical_cores},
        {"physical_cores", cpu.physical_cores},
        {"cgroup_cpus", cpu.cgroup_cpus},
        {"features", cpu.features},
        {"threads", at::get_num_threads()}}},
      {"memory",
       {{"total_bytes", memory.total_bytes},
        {"available_bytes", memory.available_bytes},
        {"usable_bytes", memory.usable_bytes()},
        {"cgroup_limit_bytes",
         memory.cgroup_limit_bytes ? Json(*memory.cgroup_limit_bytes) : Json(nullptr)}}},
      {"reads",
       {{"backend", engine->backend() == io::ReadBackend::io_uring ? "io_uring" : "pread"},
        {"reason", engine->reason()}}},
      {"disk", disk},
      {"accelerator", device},
      {"advice", advice}};
  if (options.json) {
    fmt::print("{}\n", report.dump(2));
    return 0;
  }
  std::string features;
  for (const std::string& feature : cpu.features)
    features += (features.empty() ? "" : " ") + feature;
  fmt::print("ferry       {}\n", FERRY_VERSION);
  fmt::print("libtorch    {} ({})\n", TORCH_VERSION, libtorch_path());
  fmt::print("CPU         {}, {} cores ({} physical), {} compute threads\n", cpu.model,
             cpu.logical_cores, cpu.physical_cores, at::get_num_threads());
  fmt::print("            {}\n", features.empty() ? "none of the features that matter" : features);
  fmt::print("memory      {} free of {}{}\n", format_bytes(memory.available_bytes),
             format_bytes(memory.total_bytes),
             memory.cgroup_limit_bytes ? fmt::format(", limited to {} by a cgroup",
                                                     format_bytes(*memory.cgroup_limit_bytes))
                                       : "");
  fmt::print("reads       {}\n", engine->reason());
  if (disk.contains("problem")) {
    fmt::print("disk        {}: {}\n", options.folder, disk["problem"].get<std::string>());
  } else {
    fmt::print("disk        {}: {}{}\n", options.folder,
               format_rate(static_cast<double>(disk["read_bytes_per_s"].get<uint64_t>())),
               disk["direct_io"].get<bool>() ? " with direct I/O" : " through the page cache");
  }
  fmt::print("accelerator {}{}\n", device["reason"].get<std::string>(),
             device["found"].get<bool>() ? "; used with --device cuda" : "; ferry runs on the CPU");
  for (const std::string& line : advice) fmt::print("- {}\n", line);
  if (advice.empty()) fmt::print("Nothing is missing.\n");
  return 0;
}

}  // namespace

Command add_doctor(CLI::App& app) {
  auto options = std::make_shared<DoctorOptions>();
  CLI::App* command =
      app.add_subcommand("doctor", "Show what this machine offers, and what is missing");
  command->footer(
      "Shows processor, memory, disk rate, how files are read, accelerator and libtorch, and what "
      "to do\n"
      "about what is missing.");
  command
      ->add_option("folder", options->folder,
                   "folder whose disk is measured [default: the current one]")
      ->type_name("DIR");
  add_bytes(command, "--test-size", options->test_bytes,
            "read this much to measure the disk [default: 256MiB]");
  command->add_flag("--json", options->json, "print JSON");
  return {command, [options](Context& context) { return run_doctor(*options, context); }};
}

}  // namespace ferry::cli
