#include "ferry/base/progress.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <stdexcept>

#include "ferry/base/log.h"
#include "ferry/base/terminal.h"

namespace ferry {
namespace {

using std::chrono::milliseconds;

// A bar with a clock that the test turns.
struct Fixture {
  std::string out;
  std::chrono::steady_clock::time_point time{std::chrono::hours(1)};

  ProgressOptions options(ProgressMode mode, int columns = 80) {
    ProgressOptions o;
    o.mode = mode;
    o.columns = columns;
    o.output = [this](std::string_view text) { out += text; };
    o.now = [this] { return time; };
    return o;
  }
};

TEST(Progress, LinesForAPipe) {
  Fixture f;
  {
    ProgressBar bar("denoising", 8, f.options(ProgressMode::lines));
    for (int i = 0; i < 8; ++i) {
      f.time += milliseconds(1500);
      bar.advance();
    }
    bar.finish();
    bar.finish();
  }
  EXPECT_EQ(f.out,
            "denoising: 1/8 [0:01<0:10, 1.50 s/it]\n"
            "denoising: 2/8 [0:03<0:09, 1.50 s/it]\n"
            "denoising: 4/8 [0:06<0:06, 1.50 s/it]\n"
            "denoising: 6/8 [0:09<0:03, 1.50 s/it]\n"
            "denoising: 8/8 [0:12, 1.50 s/it]\n");
}

TEST(Progress, LinesStayFewForManySteps) {
  Fixture f;
  ProgressBar bar("reading", 100000, f.options(ProgressMode::lines));
  for (int i = 0; i < 100000; ++i) bar.advance();
  bar.finish();
  EXPECT_EQ(std::count(f.out.begin(), f.out.end(), '\n'), 5);
  EXPECT_EQ(f.out.find('\x1b'), std::string::npos);
}

TEST(Progress, QuietSaysNothing) {
  Fixture f;
  ProgressBar bar("denoising", 2, f.options(ProgressMode::quiet));
  bar.advance(2);
  bar.finish();
  EXPECT_EQ(f.out, "");
}

TEST(Progress, TerminalRedrawsOneLine) {
  Fixture f;
  ProgressBar bar("denoising", 4, f.options(ProgressMode::terminal));
  f.out.clear();
  f.time += milliseconds(3000);
  bar.set_note("1.9 GB read");
  bar.advance(2);
  EXPECT_EQ(f.out,
            "\r\x1b[2Kdenoising  50%|############            | 2/4 [0:03<0:03, 1.50 s/it] "
            "1.9 GB read");
  f.out.clear();
  f.time += milliseconds(10);
  bar.advance();
  EXPECT_EQ(f.out, "") << "redrawn too soon";
  bar.advance();
  bar.finish();
  EXPECT_THAT(f.out, testing::HasSubstr("100%"));
  EXPECT_THAT(f.out, testing::EndsWith("\n"));
  EXPECT_EQ(std::count(f.out.begin(), f.out.end(), '\n'), 1);
}

TEST(Progress, NarrowTerminalIsNeverOverrun) {
  for (int columns : {1, 20, 30, 40, 60, 200}) {
    Fixture f;
    ProgressBar bar("a rather long description", 4, f.options(ProgressMode::terminal, columns));
    f.out.clear();
    bar.advance(4);
    EXPECT_LE(f.out.size(), static_cast<size_t>(std::max(9, columns)) - 1 + 5) << columns;
  }
}

TEST(Progress, ExceptionLeavesTheLineStanding) {
  Fixture f;
  try {
    ProgressBar bar("denoising", 4, f.options(ProgressMode::terminal));
    throw std::runtime_error("stop");
  } catch (const std::runtime_error&) {
  }
  EXPECT_THAT(f.out, testing::EndsWith("\n"));
}

TEST(Progress, UnknownTotalAndMoreThanTotal) {
  Fixture f;
  ProgressBar unknown("files", 0, f.options(ProgressMode::terminal));
  unknown.advance(7);
  unknown.finish();
  EXPECT_THAT(f.out, testing::HasSubstr("files 7 ["));
  f.out.clear();
  ProgressBar over("steps", 2, f.options(ProgressMode::terminal));
  over.advance(5);
  over.finish();
  EXPECT_THAT(f.out, testing::HasSubstr("100%"));
}

TEST(Progress, PipeGetsLinesByItself) {
  testing::internal::CaptureStderr();  // stderr is a file now
  ProgressBar bar("denoising", 1);
  EXPECT_EQ(bar.mode(), ProgressMode::lines);
  bar.advance();
  bar.finish();
  std::string text = testing::internal::GetCapturedStderr();
  EXPECT_THAT(text, testing::StartsWith("denoising: 1/1 ["));
}

TEST(Terminal, LogLineGoesAboveTheStatusLine) {
  testing::internal::CaptureStderr();
  terminal::set_status("50%");
  log::warn("disk is slow");
  terminal::set_status("");
  std::string text = testing::internal::GetCapturedStderr();
  EXPECT_THAT(text,
              testing::MatchesRegex("\r\x1b\\[2K50%\r\x1b\\[2K.*disk is slow\n50%\r\x1b\\[2K"));
}

}  // namespace
}  // namespace ferry
