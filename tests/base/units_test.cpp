#include "ferry/base/units.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "ferry/base/error.h"

namespace ferry {
namespace {

struct BytesCase {
  const char* text;
  uint64_t bytes;
};

TEST(ParseBytes, Table) {
  const BytesCase cases[] = {
      {"0", 0},
      {"1024", 1024},
      {"1024B", 1024},
      {" 7 ", 7},
      {"1k", 1000},
      {"1KB", 1000},
      {"1KiB", 1024},
      {"1Ki", 1024},
      {"512MiB", 536870912},
      {"512mib", 536870912},
      {"512 MiB", 536870912},
      {"6GB", 6000000000},
      {"6G", 6000000000},
      {"6gb", 6000000000},
      {"1.5GiB", 1610612736},
      {"0.5KiB", 512},
      {".5KiB", 512},
      {"1.0005KB", 1000},
      {"2TB", 2000000000000},
      {"2TiB", 2199023255552},
      {"1.5PiB", 3ull << 49},
      {"15EiB", 15ull << 60},
      {"18446744073709551615", UINT64_MAX},
      {"16777215TiB", 16777215ull << 40},
  };
  for (const BytesCase& c : cases) EXPECT_EQ(parse_bytes(c.text), c.bytes) << c.text;
}

TEST(ParseBytes, RefusesWhatIsNoSize) {
  for (const char* text : {"",
                           " ",
                           "x",
                           "MiB",
                           "-1",
                           "-5GB",
                           "1.2.3",
                           "1..",
                           ".",
                           "12XB",
                           "12 Mi B",
                           "1e3",
                           "0x10",
                           "18446744073709551616",
                           "16777216TiB",
                           "99999999999999999999999TB",
                           "1GiB/s",
                           "nan",
                           "inf",
                           "1MBB",
                           "1bb",
                           "1ib"}) {
    EXPECT_THROW(parse_bytes(text), ArgumentError) << '"' << text << '"';
  }
}

TEST(ParseBytes, ErrorNamesOptionValueAndForm) {
  try {
    parse_bytes("12 parsecs", "--memory");
    FAIL();
  } catch (const ArgumentError& error) {
    EXPECT_THAT(error.what(),
                testing::AllOf(testing::HasSubstr("--memory"), testing::HasSubstr("12 parsecs"),
                               testing::HasSubstr("512MiB")));
  }
}

TEST(ParseRate, Table) {
  EXPECT_EQ(parse_rate("500MB/s"), 500000000u);
  EXPECT_EQ(parse_rate("500 MB/S"), 500000000u);
  EXPECT_EQ(parse_rate("2GiB/s"), 2147483648u);
  EXPECT_EQ(parse_rate("1000"), 1000u);
  EXPECT_EQ(parse_rate("0"), 0u);
  for (const char* text : {"", "/s", "5/s/s", "5 MB/h"}) {
    EXPECT_THROW(parse_rate(text), ArgumentError) << text;
  }
}

TEST(FormatBytes, Table) {
  const std::pair<uint64_t, const char*> cases[] = {
      {0, "0 B"},
      {1, "1 B"},
      {1023, "1023 B"},
      {1024, "1.00 KiB"},
      {1536, "1.50 KiB"},
      {536870912, "512 MiB"},
      {1048575, "1.00 MiB"},
      {25555000000, "23.8 GiB"},
      {10 << 10, "10.0 KiB"},
      {UINT64_MAX, "16.0 EiB"},
  };
  for (const auto& [bytes, text] : cases) EXPECT_EQ(format_bytes(bytes), text);
}

TEST(FormatBytesUp, Table) {
  const std::pair<uint64_t, const char*> cases[] = {
      {0, "0 B"},
      {1023, "1023 B"},
      {1024, "1.00 KiB"},
      {1025, "1.01 KiB"},
      {10 << 10, "10.0 KiB"},
      {(10 << 10) + 1, "10.1 KiB"},
      {128 << 10, "128 KiB"},
      {(128 << 10) + 1, "129 KiB"},
      {(1023 << 10) + 1, "1.00 MiB"},
      {536870912, "512 MiB"},
      {536870913, "513 MiB"},
      {UINT64_MAX, "16.0 EiB"},
  };
  for (const auto& [bytes, text] : cases) EXPECT_EQ(format_bytes_up(bytes), text) << bytes;
}

// Whoever gives what a message asks for has given enough, and at most 1% more.
TEST(FormatBytesUp, IsEnoughWhenItIsGivenBack) {
  for (uint64_t bytes = 1; bytes < (1ull << 62); bytes = bytes * 5 / 3 + 1) {
    uint64_t back = parse_bytes(format_bytes_up(bytes));
    EXPECT_GE(back, bytes);
    EXPECT_LE(static_cast<double>(back), 1.01 * static_cast<double>(bytes) + 1) << bytes;
  }
}

TEST(FormatRate, Table) {
  EXPECT_EQ(format_rate(1.24e9), "1.24 GB/s");
  EXPECT_EQ(format_rate(999.7e6), "1.00 GB/s");
  EXPECT_EQ(format_rate(12), "12 B/s");
  EXPECT_EQ(format_rate(-1), "0 B/s");
}

TEST(FormatDuration, Table) {
  const std::pair<double, const char*> cases[] = {
      {0, "0 us"},       {12e-6, "12 us"}, {0.34, "340 ms"}, {0.9996, "1.00 s"},
      {8.25, "8.25 s"},  {59.96, "1:00"},  {125, "2:05"},    {3599.6, "1:00:00"},
      {3729, "1:02:09"}, {1.0 / 0.0, "?"}, {-3, "0 us"},
  };
  for (const auto& [seconds, text] : cases) EXPECT_EQ(format_duration(seconds), text) << seconds;
}

TEST(Literals, Values) {
  EXPECT_EQ(6_GiB, 6442450944u);
  EXPECT_EQ(3_MiB, 3145728u);
  EXPECT_EQ(2_KiB, 2048u);
}

// What is printed can be given back.
TEST(Units, FormattedBytesParse) {
  for (uint64_t bytes = 1; bytes < (1ull << 43); bytes = bytes * 3 + 1) {
    double back = static_cast<double>(parse_bytes(format_bytes(bytes)));
    EXPECT_NEAR(back / static_cast<double>(bytes), 1, 0.006) << bytes;
  }
}

}  // namespace
}  // namespace ferry
