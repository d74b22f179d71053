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

TEST(Arena, InTurnWaitsForItsPlace) {
  Arena arena(Memory::on(at::kCPU, 6 * kPage));
  auto a = arena.allocate_in_turn(2 * kPage), b = arena.allocate_in_turn(2 * kPage);
  ASSERT_TRUE(a && b);
  EXPECT_FALSE(arena.allocate_in_turn(3 * kPage)) << "the end comes before, and a is at the start";
  arena.release(*a);
  EXPECT_EQ(arena.allocate_in_turn(2 * kPage), 4 * kPage) << "behind b";
  EXPECT_FALSE(arena.allocate_in_turn(3 * kPage)) << "b is in the way";
  EXPECT_EQ(arena.allocate_in_turn(kPage), 0u);
  arena.release(4 * kPage);
  EXPECT_FALSE(arena.allocate_in_turn(2 * kPage)) << "a hole further on is not its turn";
  EXPECT_EQ(arena.allocate(2 * kPage), 4 * kPage) << "who cannot wait takes it";
}

TEST(Arena, InTurnGoesPastWhatStays) {
  Arena arena(Memory::on(at::kCPU, 6 * kPage));
  auto a = arena.allocate_in_turn(kPage), b = arena.allocate_in_turn(kPage),
       c = arena.allocate_in_turn(2 * kPage);
  ASSERT_TRUE(a && b && c);
  arena.make_lasting(*b);
  arena.set_ring_bytes(5 * kPage);
  EXPECT_EQ(arena.allocate_in_turn(2 * kPage), 4 * kPage);
  arena.release(*c);
  EXPECT_FALSE(arena.allocate_in_turn(2 * kPage)) << "a is in its way";
  arena.release(*a);
  EXPECT_EQ(arena.allocate_in_turn(2 * kPage), 2 * kPage) << "too long for the page before b";
  EXPECT_FALSE(arena.ring_has_room(2 * kPage));
  EXPECT_TRUE(arena.ring_has_room(kPage)) << "what stays is not the ring's";
}

// As in a first pass: what stays arrives one by one while others stream.
TEST(Arena, StreamedRangesStayOutOfTheWayOfWhatComesToStay) {
  for (bool in_turn : {false, true}) {
    Arena arena(Memory::on(at::kCPU, 8 * kPage));
    arena.set_ring_bytes(4 * kPage);
    auto stream = [&](uint64_t pages) {
      return in_turn ? arena.allocate_in_turn(pages * kPage) : arena.allocate(pages * kPage);
    };
    auto a = stream(2), b = stream(2);
    ASSERT_TRUE(a && b);
    EXPECT_EQ(arena.allocate_lasting(2 * kPage), 6 * kPage);
    arena.release(*a);
    EXPECT_EQ(stream(2), 0u) << "not behind b";
    arena.release(*b);
    EXPECT_EQ(stream(2), 2 * kPage);
    EXPECT_EQ(arena.allocate_lasting(2 * kPage), 4 * kPage);
  }
}

// What stays in the ring's place makes the ring longer by as much.
TEST(Arena, TheRingIsFoundBetweenWhatStays) {
  Arena arena(Memory::on(at::kCPU, 8 * kPage));
  auto a = arena.allocate(kPage), b = arena.allocate(kPage);
  ASSERT_TRUE(a && b);
  arena.make_lasting(*b);
  arena.set_ring_bytes(3 * kPage);
  EXPECT_EQ(arena.allocate_in_turn(2 * kPage), 2 * kPage);
  EXPECT_FALSE(arena.allocate_in_turn(kPage)) << "its share is used";
  arena.release(2 * kPage);
  arena.release(*a);
  EXPECT_EQ(arena.allocate_in_turn(3 * kPage), 2 * kPage) << "outside where it does not fit within";
}

TEST(Arena, WhatIsTakenBackUnusedLeavesNoGap) {
  Arena arena(Memory::on(at::kCPU, 4 * kPage));
  auto a = arena.allocate_in_turn(kPage), b = arena.allocate_in_turn(2 * kPage);
  ASSERT_TRUE(a && b);
  arena.release(*b);
  EXPECT_EQ(arena.allocate_in_turn(3 * kPage), kPage);
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
