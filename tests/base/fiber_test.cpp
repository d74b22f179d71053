#include "ferry/base/fiber.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace ferry {
namespace {

TEST(Fiber, TakesTurnsWithWhoResumes) {
  std::string trail;
  Fiber fiber([&] {
    for (char letter : {'a', 'b', 'c'}) {
      trail += letter;
      Fiber::yield();
    }
  });
  EXPECT_FALSE(Fiber::running());
  for (char digit : {'1', '2', '3', '4'}) {
    fiber.resume();
    trail += digit;
  }
  EXPECT_TRUE(fiber.done());
  EXPECT_EQ(trail, "a1b2c34");
  EXPECT_ANY_THROW(fiber.resume());
}

TEST(Fiber, ThrowsWhereItIsResumed) {
  bool unwound = false;
  struct Note {
    bool& flag;
    ~Note() { flag = true; }
  };
  Fiber fiber([&] {
    Note note{unwound};
    Fiber::yield();
    throw std::runtime_error("inside");
  });
  fiber.resume();
  EXPECT_FALSE(unwound);
  EXPECT_THROW(fiber.resume(), std::runtime_error);
  EXPECT_TRUE(unwound);
  EXPECT_TRUE(fiber.done());
}

TEST(Fiber, DestructionUnwindsTheStack) {
  std::vector<int> order;
  struct Note {
    std::vector<int>& order;
    int number;
    ~Note() { order.push_back(number); }
  };
  {
    Fiber fiber([&] {
      Note outer{order, 1};
      try {
        Note inner{order, 2};
        Fiber::yield();
        order.push_back(99);
      } catch (const std::exception&) {
        order.push_back(98);  // it is no error that a body could take for its own
      }
      order.push_back(97);
    });
    fiber.resume();
  }
  EXPECT_EQ(order, (std::vector<int>{2, 1}));
}

TEST(Fiber, OneThatNeverRanJustGoes) {
  bool ran = false;
  {
    Fiber fiber([&] { ran = true; });
  }
  EXPECT_FALSE(ran);
}

TEST(Fiber, FibersInFibersAndDeepStacks) {
  std::function<int(int)> depth = [&](int n) {
    volatile char page[4096] = {};
    page[0] = 1;
    return n == 0 ? 0 : page[0] + depth(n - 1);
  };
  int sum = 0;
  Fiber outer([&] {
    Fiber inner([&] {
      sum += depth(1000);
      Fiber::yield();
      sum += 1;
    });
    inner.resume();
    Fiber::yield();
    inner.resume();
  });
  outer.resume();
  EXPECT_EQ(sum, 1000);
  outer.resume();
  EXPECT_EQ(sum, 1001);
  EXPECT_TRUE(outer.done());
}

TEST(Fiber, YieldOutsideDoesNothing) {
  Fiber::yield();
}

}  // namespace
}  // namespace ferry
