#include "ferry/base/system_info.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <vector>

namespace ferry {
namespace {

TEST(SystemInfo, MemoryAgreesWithSysconf) {
  MemoryInfo info = memory_info();
  uint64_t pages = static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  EXPECT_NEAR(static_cast<double>(info.total_bytes), static_cast<double>(pages), 0.01 * pages);
  EXPECT_GT(info.available_bytes, 0u);
  EXPECT_LE(info.available_bytes, info.total_bytes);
  EXPECT_LE(info.usable_bytes(), info.available_bytes);
}

TEST(SystemInfo, UsableIsWhatTheCgroupLeaves) {
  MemoryInfo info;
  info.available_bytes = 100;
  EXPECT_EQ(info.usable_bytes(), 100u);
  info.cgroup_limit_bytes = 50;
  info.cgroup_used_bytes = 20;
  EXPECT_EQ(info.usable_bytes(), 30u);
  info.cgroup_used_bytes = 60;
  EXPECT_EQ(info.usable_bytes(), 0u);
  info.cgroup_limit_bytes = 1000;
  EXPECT_EQ(info.usable_bytes(), 100u);
}

TEST(SystemInfo, PeakSeesAndForgetsAnAllocation) {
  if (!reset_peak_rss()) GTEST_SKIP() << "/proc/self/clear_refs cannot be written here";
  constexpr size_t kBytes = 64 << 20;
  uint64_t before = peak_rss_bytes();
  {
    std::vector<char> block(kBytes, 1);
    EXPECT_GE(current_rss_bytes() + (8 << 20), before + kBytes);
    EXPECT_EQ(block[kBytes / 2], 1);
  }
  EXPECT_GE(peak_rss_bytes() + (8 << 20), before + kBytes);
  ASSERT_TRUE(reset_peak_rss());
#ifndef __SANITIZE_ADDRESS__  // keeps freed memory in quarantine
  EXPECT_LT(peak_rss_bytes(), before + kBytes / 2);
#endif
}

TEST(SystemInfo, Cpu) {
  CpuInfo info = cpu_info();
  EXPECT_GE(info.logical_cores, 1);
  EXPECT_GE(info.physical_cores, 1);
  EXPECT_LE(info.physical_cores, info.logical_cores);
#ifdef __x86_64__
  EXPECT_EQ(info.has("avx2"), __builtin_cpu_supports("avx2") != 0);
  EXPECT_EQ(info.has("avx512f"), __builtin_cpu_supports("avx512f") != 0);
#endif
  EXPECT_FALSE(info.has("no such feature"));
}

}  // namespace
}  // namespace ferry
