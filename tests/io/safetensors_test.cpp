#include "ferry/io/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "ferry/base/error.h"
#include "temp_folder.h"

namespace ferry::io {
namespace {

using namespace ferry::testing_io;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

std::string with_length(const std::string& json, uint64_t length) {
  std::string out;
  for (int i = 0; i < 8; ++i) out += static_cast<char>(length >> (8 * i));
  return out + json;
}

// Parses a file of this header and `data_bytes` of data.
SafetensorsHeader parse(const std::string& json, uint64_t data_bytes) {
  std::string text = with_length(json, json.size());
  return parse_safetensors_header(std::as_bytes(std::span(text)), text.size() + data_bytes, "f.st");
}

std::string tensor(const std::string& name, const std::string& dtype, const std::string& shape,
                   const std::string& offsets) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
         ",\"data_offsets\":" + offsets + "}";
}

TEST(Safetensors, ParsesInTheOrderOfOffsets) {
  std::string json = "{\"__metadata__\":{\"format\":\"pt\",\"k\":\"\"}," +
                     tensor("second", "BF16", "[2,3]", "[4,16]") + "," +
                     tensor("empty", "F32", "[0,5]", "[4,4]") + "," +
                     tensor("first", "F32", "[]", "[0,4]") + "}   ";
  SafetensorsHeader header = parse(json, 16);
  ASSERT_EQ(header.tensors.size(), 3u);
  EXPECT_EQ(header.data_begin, 8 + json.size());
  EXPECT_EQ(header.tensors[0].name, "first");
  EXPECT_EQ(header.tensors[0].shape.size(), 0u);
  EXPECT_EQ(header.tensors[0].offset, header.data_begin);
  EXPECT_EQ(header.tensors[1].name, "empty");
  EXPECT_EQ(header.tensors[1].size_bytes, 0u);
  EXPECT_EQ(header.tensors[2].name, "second");
  EXPECT_EQ(header.tensors[2].dtype, Dtype::BF16);
  EXPECT_THAT(header.tensors[2].shape, ElementsAre(2, 3));
  EXPECT_EQ(header.tensors[2].offset, header.data_begin + 4);
  EXPECT_EQ(header.tensors[2].size_bytes, 12u);
  EXPECT_THAT(header.metadata,
              ElementsAre(std::pair<const std::string, std::string>{"format", "pt"},
                          std::pair<const std::string, std::string>{"k", ""}));
}

TEST(Safetensors, AcceptsWhatTheReferenceReaderAccepts) {
  EXPECT_TRUE(parse("{}", 0).tensors.empty());
  // Fields nobody knows yet, nested as they like.
  std::string json =
      "{\"a\":{\"dtype\":\"U8\",\"new\":{\"x\":[1,{\"dtype\":2}],\"y\":null},"
      "\"n\":[[]],\"s\":1.5,\"shape\":[3],\"data_offsets\":[0,3]}}";
  SafetensorsHeader header = parse(json, 3);
  ASSERT_EQ(header.tensors.size(), 1u);
  EXPECT_THAT(header.tensors[0].shape, ElementsAre(3));
  // Misaligned data: readers copy.
  EXPECT_EQ(parse("{" + tensor("a", "U8", "[3]", "[0,3]") + "," +
                      tensor("b", "F64", "[1]", "[3,11]") + "}",
                  11)
                .tensors.size(),
            2u);
}

struct BadHeader {
  const char* what;
  std::string json;
  uint64_t data_bytes;
  std::vector<std::string> message;  // parts that must be in it
};

void PrintTo(const BadHeader& bad, std::ostream* out) {
  *out << bad.what;
}

class SafetensorsBad : public testing::TestWithParam<BadHeader> {};

TEST_P(SafetensorsBad, IsRefusedWithAReason) {
  const BadHeader& bad = GetParam();
  std::string message = error_of<FormatError>([&] { parse(bad.json, bad.data_bytes); });
  EXPECT_THAT(message, HasSubstr("f.st"));
  for (const std::string& part : bad.message) EXPECT_THAT(message, HasSubstr(part));
}

std::string one(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return "{" + tensor("w", dtype, shape, offsets) + "}";
}

const BadHeader kBad[] = {
    {"empty text", "", 0, {"does not begin with '{'"}},
    {"array", "[]", 0, {"does not begin with '{'"}},
    {"leading space", " {}", 0, {"does not begin with '{'"}},
    {"cut JSON", "{\"a\":", 0, {"broken JSON at offset"}},
    {"text behind", "{} x", 0, {"broken JSON"}},
    {"NUL behind", std::string("{}\0\0", 4), 0, {"NUL byte"}},
    {"invalid UTF-8", "{\"\xff\":{}}", 0, {"broken JSON"}},
    {"tensor twice",
     "{" + tensor("w", "U8", "[1]", "[0,1]") + "," + tensor("w", "U8", "[1]", "[1,2]") + "}",
     2,
     {"\"w\" occurs twice"}},
    {"metadata twice", "{\"__metadata__\":{},\"__metadata__\":{}}", 0, {"__metadata__", "twice"}},
    {"metadata key twice", "{\"__metadata__\":{\"a\":\"\",\"a\":\"\"}}", 0, {"\"a\" occurs twice"}},
    {"field twice",
     "{\"w\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}",
     1,
     {"\"w\"", "\"dtype\" occurs twice"}},
    {"metadata no object", "{\"__metadata__\":3}", 0, {"__metadata__", "a number"}},
    {"metadata value no string", "{\"__metadata__\":{\"a\":1}}", 0, {"\"a\" is a number"}},
    {"metadata value nested", "{\"__metadata__\":{\"a\":{}}}", 0, {"\"a\" is an object"}},
    {"tensor no object", "{\"w\":[]}", 0, {"\"w\" is an array"}},
    {"tensor null", "{\"w\":null}", 0, {"\"w\" is null"}},
    {"dtype unknown", one("F128", "[1]", "[0,16]"), 16, {"\"w\"", "F128", "BF16"}},
    {"dtype number",
     "{\"w\":{\"dtype\":1,\"shape\":[1],\"data_offsets\":[0,1]}}",
     1,
     {"\"dtype\" is a number, expected a string"}},
    {"dtype missing",
     "{\"w\":{\"shape\":[1],\"data_offsets\":[0,1]}}",
     1,
     {"\"dtype\" is missing"}},
    {"shape missing",
     "{\"w\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}",
     1,
     {"\"shape\" is missing"}},
    {"offsets missing",
     "{\"w\":{\"dtype\":\"U8\",\"shape\":[1]}}",
     1,
     {"\"data_offsets\" is missing"}},
    {"shape string", one("U8", "\"1\"", "[0,1]"), 1, {"\"shape\" is a string"}},
    {"shape nested", one("U8", "[[1]]", "[0,1]"), 1, {"\"shape\" holds an array"}},
    {"shape object", one("U8", "{}", "[0,1]"), 1, {"\"shape\" is an object"}},
    {"shape negative", one("U8", "[-1]", "[0,1]"), 1, {"\"shape\" holds -1"}},
    {"shape fraction", one("U8", "[1.0]", "[0,1]"), 1, {"\"shape\" holds 1.0"}},
    {"shape null", one("U8", "[null]", "[0,1]"), 1, {"\"shape\" holds null"}},
    {"shape huge", one("U8", "[18446744073709551615]", "[0,1]"), 1, {"too large"}},
    {"shape beyond 64 bits", one("U8", "[99999999999999999999]", "[0,1]"), 1, {"\"shape\" holds"}},
    {"shape overflows", one("F32", "[4294967296,4294967296]", "[0,0]"), 0, {"too many elements"}},
    {"shape overflows to its size",
     one("F32", "[4611686018427387905]", "[0,4]"),
     4,
     {"too many elements"}},
    {"offsets one", one("U8", "[1]", "[1]"), 1, {"holds 1 numbers"}},
    {"offsets three", one("U8", "[1]", "[0,1,2]"), 1, {"holds 3 numbers"}},
    {"offsets negative", one("U8", "[1]", "[-1,0]"), 1, {"\"data_offsets\" holds -1"}},
    {"offsets fraction", one("U8", "[1]", "[0,1e0]"), 1, {"\"data_offsets\" holds 1e0"}},
    {"offsets reversed", one("U8", "[1]", "[1,0]"), 1, {"before they begin"}},
    {"range too short", one("F32", "[2]", "[0,4]"), 4, {"span 4 bytes, expected 8 for F32"}},
    {"range too long", one("F32", "[1]", "[0,8]"), 8, {"span 8 bytes, expected 4"}},
    {"range past the end", one("U8", "[8]", "[0,8]"), 7, {"\"w\"", "truncated"}},
    {"range far past the end",
     one("U8", "[1]", "[18446744073709551614,18446744073709551615]"),
     1,
     {"truncated"}},
    {"trailing bytes", one("U8", "[8]", "[0,8]"), 9, {"trailing bytes"}},
    {"data without tensors", "{}", 1, {"trailing bytes"}},
    {"hole in front", one("U8", "[1]", "[1,2]"), 2, {"1 bytes before tensor \"w\""}},
    {"hole between",
     "{" + tensor("v", "U8", "[1]", "[0,1]") + "," + tensor("w", "U8", "[1]", "[2,3]") + "}",
     3,
     {"before tensor \"w\""}},
    {"overlap",
     "{" + tensor("v", "U8", "[2]", "[0,2]") + "," + tensor("w", "U8", "[2]", "[1,3]") + "}",
     3,
     {"\"w\"", "overlaps \"v\""}},
    {"same range",
     "{" + tensor("v", "U8", "[2]", "[0,2]") + "," + tensor("w", "U8", "[2]", "[0,2]") + "}",
     2,
     {"overlaps"}},
    {"empty inside another",
     "{" + tensor("v", "U8", "[2]", "[0,2]") + "," + tensor("w", "U8", "[0]", "[1,1]") + "}",
     2,
     {"overlaps"}},
    {"deep unknown field",
     "{\"w\":{\"x\":" + std::string(100000, '[') + "}}",
     0,
     {"nested deeper"}},
    {"deep unknown objects",
     "{\"w\":{\"x\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":"
     "{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":"
     "{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":1",
     0,
     {"nested deeper"}},
};

INSTANTIATE_TEST_SUITE_P(Fields, SafetensorsBad, testing::ValuesIn(kBad));

TEST(Safetensors, HeaderLength) {
  auto parse_raw = [](const std::string& bytes, uint64_t file_size) {
    parse_safetensors_header(std::as_bytes(std::span(bytes)), file_size, "f.st");
  };
  EXPECT_THAT(error_of<FormatError>([&] { parse_raw("", 0); }), HasSubstr("0 bytes"));
  EXPECT_THAT(error_of<FormatError>([&] { parse_raw("1234567", 7); }), HasSubstr("7 bytes"));
  EXPECT_THAT(error_of<FormatError>([&] { parse_raw(with_length("{}", 3), 10); }),
              AllOf(HasSubstr("claims 3"), HasSubstr("truncated")));
  for (uint64_t length : {100'000'001ull, ~0ull, ~0ull - 7, 1ull << 63}) {
    EXPECT_THAT(error_of<FormatError>([&] { parse_raw(with_length("{}", length), 10); }),
                HasSubstr("at most 100000000"));
  }
  // Given fewer bytes than the header has.
  EXPECT_THROW(parse_raw(with_length("{", 2), 10), FormatError);
  EXPECT_THROW(parse_raw("123", 10), FormatError);
}

TEST(Safetensors, EveryCutOfAFileIsRefused) {
  TempFolder folder;
  std::string json =
      "{" + tensor("v", "F32", "[2]", "[0,8]") + "," + tensor("w", "U8", "[3]", "[8,11]") + "}";
  std::string text = with_length(json, json.size()) + std::string(11, 'x');
  write_text(folder / "whole", text);
  EXPECT_EQ(read_safetensors_header(*File::open(folder / "whole")).tensors.size(), 2u);
  for (size_t size = 0; size < text.size(); ++size) {
    write_text(folder / "cut", text.substr(0, size));
    EXPECT_THAT(
        error_of<FormatError>([&] { read_safetensors_header(*File::open(folder / "cut")); }),
        HasSubstr("cut"));
  }
}

// One changed byte may give another valid header; it must never give ranges outside of the file.
TEST(Safetensors, ChangedBytesNeverEscapeTheFile) {
  std::string json =
      "{" + tensor("v", "F32", "[2]", "[0,8]") + "," + tensor("w", "U8", "[3]", "[8,11]") + "}";
  std::string text = with_length(json, json.size());
  uint64_t file_size = text.size() + 11;
  for (size_t at = 0; at < text.size(); ++at) {
    for (int value = 0; value < 256; value += 5) {
      std::string changed = text;
      changed[at] = static_cast<char>(value);
      try {
        SafetensorsHeader header =
            parse_safetensors_header(std::as_bytes(std::span(changed)), file_size, "f");
        for (const TensorInfo& info : header.tensors) {
          EXPECT_LE(info.offset + info.size_bytes, file_size);
        }
      } catch (const FormatError&) {
      }
    }
  }
}

}  // namespace
}  // namespace ferry::io
