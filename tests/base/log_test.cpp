#include "ferry/base/log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <vector>

#include "ferry/base/error.h"

namespace ferry {
namespace {

class LogTest : public testing::Test {
 protected:
  void SetUp() override {
    log::set_sink([this](log::Level level, std::string_view text) {
      lines_.push_back(std::string(log::name(level)) + ":" + std::string(text));
    });
  }
  void TearDown() override {
    log::set_sink({});
    log::set_level(log::Level::info);
  }
  std::vector<std::string> lines_;
};

TEST_F(LogTest, FormatsAndFiltersByLevel) {
  log::set_level(log::Level::warn);
  log::info("hidden {}", 1);
  log::warn("seen {}", 2);
  log::error("seen {}", 3);
  log::set_level(log::Level::trace);
  log::trace("seen {}", 4);
  log::set_level(log::Level::off);
  log::error("hidden {}", 5);
  EXPECT_THAT(lines_, testing::ElementsAre("warn:seen 2", "error:seen 3", "trace:seen 4"));
}

TEST_F(LogTest, BracesInMessagesAreKept) {
  log::write(log::Level::warn, "{} {not a field}");
  EXPECT_THAT(lines_, testing::ElementsAre("warn:{} {not a field}"));
}

TEST_F(LogTest, LevelNames) {
  EXPECT_EQ(log::parse_level("DEBUG"), log::Level::debug);
  EXPECT_EQ(log::parse_level("warning"), log::Level::warn);
  EXPECT_EQ(log::parse_level("off"), log::Level::off);
  EXPECT_THROW(log::parse_level("loud"), ArgumentError);
  EXPECT_THROW(log::parse_level(""), ArgumentError);
}

TEST_F(LogTest, ThreadsDoNotLoseOrMixLines) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t] {
      for (int i = 0; i < 200; ++i) log::info("thread {} line {}", t, i);
    });
  }
  for (std::thread& thread : threads) thread.join();
  ASSERT_EQ(lines_.size(), 800u);
  for (const std::string& line : lines_) {
    EXPECT_THAT(line, testing::MatchesRegex("info:thread [0-9] line [0-9]+"));
  }
}

TEST(LogToStderr, OneLineWithLevel) {
  testing::internal::CaptureStderr();
  log::warn("to {}", "stderr");
  std::string text = testing::internal::GetCapturedStderr();
  EXPECT_THAT(text,
              testing::AllOf(testing::HasSubstr("warning to stderr"), testing::EndsWith("\n")));
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1);
}

}  // namespace
}  // namespace ferry
