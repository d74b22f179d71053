#include "ferry/base/system_info.h"

#include <sched.h>

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <string_view>

// Of jemalloc, which the program may or may not be linked with.
extern "C" int mallctl(const char* name, void* old, size_t* old_bytes, void* next,
                       size_t next_bytes) __attribute__((weak));

namespace ferry {
namespace {

namespace fs = std::filesystem;

std::string read_file(const fs::path& path) {
  std::ifstream in(path);
  std::ostringstream text;
  text << in.rdbuf();
  return in ? text.str() : "";
}

// "max" and broken text give nothing.
std::optional<uint64_t> read_number(const fs::path& path) {
  std::string text = read_file(path);
  uint64_t value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc()) return std::nullopt;
  return value;
}

// "VmHWM:    1234 kB" in a file of such lines; 0 if the key is absent.
uint64_t kilobyte_field(const fs::path& path, std::string_view key) {
  std::ifstream in(path);
  std::string line;
  while (std::getline(in, line)) {
    if (line.size() <= key.size() || line.compare(0, key.size(), key) != 0 ||
        line[key.size()] != ':') {
      continue;
    }
    return std::strtoull(line.c_str() + key.size() + 1, nullptr, 10) * 1024;
  }
  return 0;
}

// The process's own folder in the given hierarchy ("" for v2) and all folders above it.
std::vector<fs::path> cgroup_folders(const std::string& controller) {
  std::ifstream in("/proc/self/cgroup");
  std::string line;
  while (std::getline(in, line)) {  // "4:memory:/a/b" or "0::/a/b"
    size_t first = line.find(':');
    size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    bool match = controller.empty() ? controllers == ",,"
                                    : controllers.find("," + controller + ",") != std::string::npos;
    if (!match) continue;
    fs::path root = controller.empty() ? "/sys/fs/cgroup" : "/sys/fs/cgroup/" + controller;
    fs::path inside = fs::path(line.substr(second + 1)).relative_path();
    std::vector<fs::path> folders;
    // In a container the path may be the host's and lead nowhere; the root is its own then.
    for (fs::path at = inside; !at.empty(); at = at.parent_path()) folders.push_back(root / at);
    folders.push_back(root);
    return folders;
  }
  return {};
}

void read_cgroup_memory(MemoryInfo& info) {
  auto consider = [&](const fs::path& folder, const char* limit_name, const char* used_name) {
    std::optional<uint64_t> limit = read_number(folder / limit_name);
    // v1 writes a huge number for "no limit".
    if (!limit || *limit >= (1ull << 60)) return;
    if (info.cgroup_limit_bytes && *info.cgroup_limit_bytes <= *limit) return;
    info.cgroup_limit_bytes = limit;
    info.cgroup_used_bytes = read_number(folder / used_name);
  };
  for (const fs::path& folder : cgroup_folders("")) {
    consider(folder, "memory.max", "memory.current");
  }
  for (const fs::path& folder : cgroup_folders("memory")) {
    consider(folder, "memory.limit_in_bytes", "memory.usage_in_bytes");
  }
}

double cgroup_cpus() {
  double least = 0;
  auto consider = [&](double quota, double period) {
    if (quota > 0 && period > 0 && (least == 0 || quota / period < least)) least = quota / period;
  };
  for (const fs::path& folder : cgroup_folders("")) {
    double quota = 0;
    double period = 0;
    std::istringstream text(read_file(folder / "cpu.max"));  // "max 100000" or "200000 100000"
    if (text >> quota >> period) consider(quota, period);
  }
  for (const fs::path& folder : cgroup_folders("cpu")) {
    consider(static_cast<double>(read_number(folder / "cpu.cfs_quota_us").value_or(0)),
             static_cast<double>(read_number(folder / "cpu.cfs_period_us").value_or(0)));
  }
  return least;
}

}  // namespace

uint64_t MemoryInfo::usable_bytes() const {
  if (!cgroup_limit_bytes) return available_bytes;
  uint64_t used = std::min(cgroup_used_bytes.value_or(0), *cgroup_limit_bytes);
  return std::min(available_bytes, *cgroup_limit_bytes - used);
}

MemoryInfo memory_info() {
  MemoryInfo info;
  info.total_bytes = kilobyte_field("/proc/meminfo", "MemTotal");
  info.available_bytes = kilobyte_field("/proc/meminfo", "MemAvailable");
  read_cgroup_memory(info);
  return info;
}

uint64_t current_rss_bytes() {
  return kilobyte_field("/proc/self/status", "VmRSS");
}
uint64_t peak_rss_bytes() {
  return kilobyte_field("/proc/self/status", "VmHWM");
}

bool reset_peak_rss() {
  std::ofstream out("/proc/self/clear_refs");
  out << "5" << std::flush;
  return static_cast<bool>(out);
}

void give_back_free_memory() noexcept {
  if (mallctl) mallctl("arena.4096.purge", nullptr, nullptr, nullptr, 0);  // 4096: all arenas
}

bool CpuInfo::has(const std::string& feature) const {
  return std::find(features.begin(), features.end(), feature) != features.end();
}

CpuInfo cpu_info() {
  CpuInfo info;
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  bool know_allowed = ::sched_getaffinity(0, sizeof(allowed), &allowed) == 0;

  static const std::vector<std::string> kFeatures = {
      "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni",
      "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "amx_fp16",
      // Arm
      "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2"};
  std::set<std::string> flags;
  std::ifstream in("/proc/cpuinfo");
  std::string line;
  std::set<std::pair<std::string, std::string>> cores;
  int processor = -1;
  while (std::getline(in, line)) {
    size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    std::string key = line.substr(0, line.find_last_not_of(" \t", colon - 1) + 1);
    std::string value = colon + 2 <= line.size() ? line.substr(colon + 2) : "";
    if (key == "processor") {
      processor = std::atoi(value.c_str());
      if (know_allowed && !CPU_ISSET(processor, &allowed)) continue;
      ++info.logical_cores;
      // Hyper-threads of one core list each other; machines without the file count each alone.
      std::string siblings = read_file("/sys/devices/system/cpu/cpu" + std::to_string(processor) +
                                       "/topology/thread_siblings_list");
      cores.emplace(siblings, siblings.empty() ? value : "");
    } else if (key == "model name" && info.model.empty()) {
      info.model = value;
    } else if ((key == "flags" || key == "Features") && flags.empty()) {
      std::istringstream words(value);
      for (std::string word; words >> word;) flags.insert(word);
    }
  }
  info.physical_cores = static_cast<int>(cores.size());
  for (const std::string& feature : kFeatures) {
    if (flags.contains(feature)) info.features.push_back(feature);
  }
  info.cgroup_cpus = cgroup_cpus();
  return info;
}

}  // namespace ferry
