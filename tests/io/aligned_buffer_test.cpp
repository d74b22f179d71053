#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <new>
#include <string>

#include "ferry/base/error.h"
#include "ferry/base/system_info.h"
#include "ferry/io/read_engine.h"

namespace ferry::io {
namespace {

TEST(AlignedBuffer, AlignedAndWritable) {
  for (size_t size : {1, 63, 4096, 65535, 65536, 65537, 3 << 20}) {
    for (size_t alignment : {1, 64, 512, 4096, 65536, 2 << 20}) {
      AlignedBuffer buffer(size, alignment);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % alignment, 0u);
      EXPECT_EQ(buffer.size_bytes(), size);
      std::memset(buffer.data(), 7, size);
    }
  }
}

// Of this process, in KiB.
uint64_t huge_page_kib() {
  std::ifstream file("/proc/self/smaps_rollup");
  for (std::string word; file >> word;) {
    uint64_t kib = 0;
    if (word == "AnonHugePages:" && file >> kib) return kib;
  }
  return 0;
}

TEST(AlignedBuffer, LargeOnesAreOfHugePages) {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string enabled;
  if (!std::getline(file, enabled) || enabled.find("[never]") != std::string::npos) {
    GTEST_SKIP() << "this system has no transparent huge pages";
  }
  uint64_t before = huge_page_kib();
  AlignedBuffer buffer(64 << 20);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % (2 << 20), 0u);
  std::memset(buffer.data(), 1, buffer.size_bytes());
  EXPECT_GT(huge_page_kib(), before);
}

TEST(AlignedBuffer, EmptyAndMoved) {
  AlignedBuffer empty(0);
  EXPECT_EQ(empty.data(), nullptr);
  AlignedBuffer a(100000);
  std::byte* data = a.data();
  AlignedBuffer b = std::move(a);
  EXPECT_EQ(b.data(), data);
  AlignedBuffer c(10);
  c = std::move(b);
  EXPECT_EQ(c.data(), data);
  EXPECT_EQ(c.size_bytes(), 100000u);
}

TEST(AlignedBuffer, RefusesWhatCannotBe) {
  EXPECT_THROW(AlignedBuffer(16, 3), ArgumentError);
  EXPECT_THROW(AlignedBuffer(16, 0), ArgumentError);
  EXPECT_THROW(AlignedBuffer(SIZE_MAX), std::bad_alloc);
  EXPECT_THROW(AlignedBuffer(SIZE_MAX / 4), std::bad_alloc);
}

#ifndef __SANITIZE_ADDRESS__
#ifndef __SANITIZE_THREAD__
TEST(AlignedBuffer, MemoryGoesBackWhenFreed) {
  uint64_t before = current_rss_bytes();
  {
    AlignedBuffer buffer(128 << 20);
    std::memset(buffer.data(), 1, buffer.size_bytes());
    EXPECT_GT(current_rss_bytes(), before + (120 << 20));
  }
  EXPECT_LT(current_rss_bytes(), before + (16 << 20));
}
#endif
#endif

}  // namespace
}  // namespace ferry::io
