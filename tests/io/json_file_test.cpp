#include "ferry/io/json_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "ferry/base/error.h"
#include "temp_folder.h"

namespace ferry::io {
namespace {

using namespace ferry::testing_io;
using testing::AllOf;
using testing::HasSubstr;

TEST(JsonFile, Reads) {
  TempFolder folder;
  write_text(folder / "a.json", "{\"x\": [1, 2.5, null, \"\\u00e9\"]}\n");
  nlohmann::json value = read_json_object(folder / "a.json");
  EXPECT_EQ(value["x"][0], 1);
  EXPECT_EQ(value["x"][3], "\xc3\xa9");
}

TEST(JsonFile, BrokenTextNamesFileLineAndColumn) {
  TempFolder folder;
  write_text(folder / "a.json", "{\n  \"x\": 1,\n  \"y\" 2\n}");
  EXPECT_THAT(
      error_of<FormatError>([&] { read_json_file(folder / "a.json"); }),
      AllOf(HasSubstr((folder / "a.json").string()), HasSubstr("line 3"), HasSubstr("column")));
}

TEST(JsonFile, EveryKindOfBrokenText) {
  for (const char* text : {"", " ", "{", "[1,", "{\"a\"}", "nul", "\"\xff\"", "{} x", "[1]]", "01",
                           "\"unterminated", "{\"a\":1,}", "\xef\xbb\xbf\xef\xbb\xbf{}", "NaN"}) {
    EXPECT_THROW(parse_json(text, "t"), FormatError) << text;
  }
  EXPECT_THROW(parse_json(std::string_view("{}\0{}", 5), "t"), FormatError);
}

TEST(JsonFile, DepthIsLimited) {
  auto nested = [](int depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  EXPECT_NO_THROW(parse_json(nested(64), "t"));
  EXPECT_THAT(error_of<FormatError>([&] { parse_json(nested(65), "t"); }), HasSubstr("64 levels"));
  EXPECT_THROW(parse_json(std::string(1 << 20, '['), "t"), FormatError);
  EXPECT_THROW(parse_json(std::string(1 << 20, '{'), "t"), FormatError);
  // Brackets in strings are text.
  EXPECT_NO_THROW(parse_json("\"" + std::string(1000, '[') + "\\\"[\"", "t"));
}

TEST(JsonFile, SizeIsLimited) {
  TempFolder folder;
  write_text(folder / "a.json", "[1, 2, 3, 4, 5]");
  EXPECT_THAT(error_of<FormatError>([&] { read_json_file(folder / "a.json", {.max_bytes = 10}); }),
              HasSubstr("at most 10 B"));
  EXPECT_THROW(parse_json("[1, 2, 3, 4, 5]", "t", {.max_bytes = 10}), FormatError);
}

TEST(JsonFile, ObjectAndMissingFile) {
  TempFolder folder;
  write_text(folder / "a.json", "[]");
  EXPECT_THAT(error_of<FormatError>([&] { read_json_object(folder / "a.json"); }),
              HasSubstr("got a JSON array, expected an object"));
  EXPECT_THROW(read_json_file(folder / "none.json"), IoError);
}

}  // namespace
}  // namespace ferry::io
