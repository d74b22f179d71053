#include "ferry/offload/arena.h"

#include <gtest/gtest.h>

#include <map>
#include <random>

#include "ferry/base/error.h"

namespace ferry::offload {
namespace {

constexpr uint64_t kPage = Arena::kAlignment;

TEST(Arena, HandsOutAlignedRangesUntilFull) {
  Arena arena(4 * kPage);
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
  Arena arena(5 * kPage);
  auto a = arena.allocate(2 * kPage), b = arena.allocate(2 * kPage);
  arena.release(*a);
  auto c = arena.allocate(2 * kPage);  // does not fit behind b
  ASSERT_TRUE(b && c);
  EXPECT_EQ(*c, 0u);
}

TEST(Arena, ReleasingTwiceIsAnError) {
  Arena arena(kPage);
  auto a = arena.allocate(kPage);
  arena.release(*a);
  EXPECT_THROW(arena.release(*a), Error);
}

// Against a page map: ranges never overlap, and an allocation fails only if no hole is large
// enough.
TEST(Arena, AgreesWithAPageMap) {
  constexpr uint64_t kPages = 64;
  Arena arena(kPages * kPage);
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
