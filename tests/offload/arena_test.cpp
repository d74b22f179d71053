#include "ferry/offload/arena.h"

#include <gtest/gtest.h>

#include <map>
#include <random>

#include "ferry/base/error.h"

namespace ferry::offload {
namespace {

constexpr uint64_t kPage = Arena::kAlignment;

TEST(Arena, HandsOutAlignedRangesUntilFull) {
  Arena arena(Memory::on(at::kCPU, 4 * kPage));
  auto a = arena.allocate(1), b = arena.allocate(2 * kPage), c = arena.allocate(kPage);
  ASSERT_TRUE(a && b && c);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(arena.at(*b)) % kPage, 0u);
  EXPECT_FALSE(arena.allocate(1));
  arena.release(*b);
  EXPECT_TRUE(arena.allocate(kPage));
  EXPECT_FALSE(arena.allocate(2 * kPage)) << "one page is left";
  EXPECT_EQ(arena.peak_bytes(), 4 * kPage);
}

TEST(Arena, WrapsAround) {
  Arena arena(Memory::on(at::kCPU, 5 * kPage));
  auto a = arena.allocate(2 * kPage), b = arena.allocate(2 * kPage);
  arena.release(*a);
  auto c = arena.allocate(2 * kPage);  // does not fit behind b
  ASSERT_TRUE(b && c);
  EXPECT_EQ(*c, 0u);
}

TEST(Arena, ReleasingTwiceIsAnError) {
  Arena arena(Memory::on(at::kCPU, kPage));
  auto a = arena.allocate(kPage);
  arena.release(*a);
  EXPECT_THROW(arena.release(*a), Error);
}

TEST(Arena, LastingRangesComeFromTheEndAndLeaveTheRing) {
  Arena arena(Memory::on(at::kCPU, 8 * kPage));
  arena.set_ring_bytes(4 * kPage);
  auto a = arena.allocate_lasting(2 * kPage), b = arena.allocate_lasting(2 * kPage);
  ASSERT_TRUE(a && b);
  EXPECT_EQ(*a, 6 * kPage);
  EXPECT_EQ(*b, 4 * kPage);
  EXPECT_FALSE(arena.allocate_lasting(5 * kPage));
  auto c = arena.allocate(4 * kPage);
  ASSERT_TRUE(c);
  EXPECT_EQ(*c, 0u);
  arena.release(*a);
  EXPECT_FALSE(arena.ring_has_room(1));
  EXPECT_FALSE(arena.allocate(1)) << "the ring has its share, though there is a hole";
  EXPECT_EQ(*arena.allocate_lasting(kPage), 7 * kPage);
}

// Against a page map: ranges never overlap, and an allocation fails only if no hole is large
// enough.
TEST(Arena, AgreesWithAPageMap) {
  constexpr uint64_t kPages = 64;
  Arena arena(Memory::on(at::kCPU, kPages * kPage));
  std::vector<bool> taken(kPages, false);
  std::map<uint64_t, uint64_t> ranges;
  std::mt19937 random(7);
  for (int i = 0; i < 20000; ++i) {
    if (random() % 2) {
      uint64_t pages = 1 + random() % 12;
      auto offset = arena.allocate(pages * kPage - random() % kPage);
      if (!offset) {
        uint64_t run = 0, longest = 0;
        for (bool used : taken) longest = std::max(longest, run = used ? 0 : run + 1);
        ASSERT_LT(longest, pages);
        continue;
      }
      for (uint64_t page = 0; page < pages; ++page) {
        ASSERT_FALSE(taken.at(*offset / kPage + page));
        taken.at(*offset / kPage + page) = true;
      }
      ranges[*offset] = pages;
    } else if (!ranges.empty()) {
      auto range = std::next(ranges.begin(), random() % ranges.size());
      for (uint64_t page = 0; page < range->second; ++page)
        taken[range->first / kPage + page] = false;
      arena.release(range->first);
      ranges.erase(range);
    }
  }
}

}  // namespace
}  // namespace ferry::offload
