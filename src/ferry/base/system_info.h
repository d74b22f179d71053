// What this machine offers: memory, processors. For planning and `ferry doctor`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace ferry {

struct MemoryInfo {
  uint64_t total_bytes = 0;      // RAM
  uint64_t available_bytes = 0;  // without swapping (MemAvailable)
  // The tightest memory limit of this process's cgroup and those around it (v2 or v1), if any.
  std::optional<uint64_t> cgroup_limit_bytes;
  std::optional<uint64_t> cgroup_used_bytes;  // of the cgroup with that limit

  // What this process can still use: the lesser of available RAM and what is left of the limit.
  // The page cache counts as used in a cgroup, though the kernel would give it up.
  uint64_t usable_bytes() const;
};
// Fields that cannot be read are 0 or empty.
MemoryInfo memory_info();

// Current and highest resident set of this process, in bytes (VmRSS, VmHWM); 0 if unknown.
uint64_t current_rss_bytes();
uint64_t peak_rss_bytes();
// Starts the peak anew from the current value. False where the kernel does not allow it.
bool reset_peak_rss();
// What the allocator keeps of freed memory goes back to the system, where the program has jemalloc;
// any other one is left to its own rules.
void give_back_free_memory() noexcept;

struct CpuInfo {
  std::string model;       // "Intel(R) Xeon(R) ..."
  int logical_cores = 0;   // that this process may run on (affinity)
  int physical_cores = 0;  // among those
  double cgroup_cpus = 0;  // CPU time a cgroup allows, in cores; 0: no limit
  // Of the flags that decide how fast kernels are, those that are there: "avx2", "avx512f",
  // "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", …
  std::vector<std::string> features;

  bool has(const std::string& feature) const;
};
CpuInfo cpu_info();

}  // namespace ferry
