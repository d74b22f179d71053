#include "ferry/io/gguf.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "ferry/base/error.h"
#include "temp_folder.h"

namespace ferry::io {
namespace {

using namespace ferry::testing_io;
using testing::ElementsAre;
using testing::HasSubstr;

// A header put together byte by byte, with nothing checked.
struct Bytes {
  std::string out;

  template <class T>
  Bytes& number(T value) {
    out.append(reinterpret_cast<const char*>(&value), sizeof(T));
    return *this;
  }
  Bytes& text(const std::string& value) {
    number<uint64_t>(value.size());
    out += value;
    return *this;
  }
  Bytes& begin(uint64_t tensors, uint64_t values, uint32_t version = 3) {
    out += "GGUF";
    return number(version).number(tensors).number(values);
  }
  Bytes& key(const std::string& name, uint32_t type) { return text(name).number(type); }
  Bytes& tensor(const std::string& name, const std::vector<uint64_t>& dims, uint32_t type,
                uint64_t offset) {
    text(name).number(static_cast<uint32_t>(dims.size()));
    for (uint64_t extent : dims) number(extent);
    return number(type).number(offset);
  }
};

constexpr uint32_t kF32 = 0, kU32 = 4, kBool = 7, kString = 8, kArray = 9, kQ4_0 = 2, kQ4_K = 12;

// Parses a file of this header, padded to 32, and `data_bytes` of data.
GgufHeader parse(std::string header, uint64_t data_bytes, uint64_t alignment = 32) {
  header.resize((header.size() + alignment - 1) / alignment * alignment);
  return parse_gguf_header(std::as_bytes(std::span(header)), header.size() + data_bytes, "f.gguf");
}

std::string fixture(const std::string& name) {
  return std::string(FERRY_FIXTURES) + "/quant/" + name;
}

// Written by the gguf package.
TEST(Gguf, ReadsWhatPythonWrote) {
  auto file = File::open(fixture("gguf_metadata.gguf"));
  EXPECT_TRUE(is_gguf(*file));
  GgufHeader header = read_gguf_header(*file);
  EXPECT_EQ(header.version, 3u);
  EXPECT_EQ(header.alignment, 32u);
  EXPECT_EQ(header.data_begin % 32, 0u);
  auto value = [&](const char* key) -> const GgufValue& {
    const GgufValue* found = find_value(header.metadata, key);
    if (!found) throw std::runtime_error(std::string("no key ") + key);
    return *found;
  };
  EXPECT_EQ(header.metadata.size(), 18u);
  EXPECT_EQ(header.metadata[0].first, "general.architecture");
  EXPECT_EQ(*value("general.architecture").as_string(), "flux");
  EXPECT_EQ(std::get<uint64_t>(value("a.u8").data), 200u);
  EXPECT_EQ(value("a.u8").type, GgufType::u8);
  EXPECT_EQ(std::get<int64_t>(value("a.i8").data), -100);
  EXPECT_EQ(value("a.u16").as_integer(), 60000);
  EXPECT_EQ(value("a.i16").as_integer(), -30000);
  EXPECT_EQ(value("a.u32").as_integer(), 4000000000);
  EXPECT_EQ(value("a.i32").as_integer(), -2000000000);
  EXPECT_EQ(std::get<double>(value("a.f32").data), static_cast<double>(0.1f));
  EXPECT_EQ(std::get<bool>(value("a.bool").data), true);
  EXPECT_EQ(*value("a.string").as_string(), "Grüße");
  EXPECT_EQ(std::get<uint64_t>(value("a.u64").data), UINT64_MAX);
  EXPECT_EQ(value("a.u64").as_integer(), std::nullopt);
  EXPECT_EQ(std::get<int64_t>(value("a.i64").data), INT64_MIN);
  EXPECT_EQ(std::get<double>(value("a.f64").data), 0.1);
  EXPECT_THAT(*value("b.strings").as_strings(), ElementsAre("<pad>", "", "▁the"));
  EXPECT_THAT(std::get<std::vector<double>>(value("b.floats").data), ElementsAre(0.5, -1.25));
  EXPECT_THAT(*value("b.ints").as_integers(), ElementsAre(1, -2, 3));
  EXPECT_THAT(std::get<std::vector<bool>>(value("b.bools").data), ElementsAre(true, false));
  EXPECT_THAT(*value("b.bytes").as_integers(), ElementsAre(0, 255, 16));
  EXPECT_EQ(value("a.string").as_integer(), std::nullopt);
  EXPECT_EQ(value("b.ints").as_string(), nullptr);
  EXPECT_EQ(find_value(header.metadata, "b"), nullptr);

  ASSERT_EQ(header.tensors.size(), 6u);
  EXPECT_EQ(header.tensors[0].name, "plain.f32");
  EXPECT_THAT(header.tensors[0].shape, ElementsAre(3, 5));
  EXPECT_EQ(header.tensors[0].offset, header.data_begin);
  EXPECT_EQ(header.tensors[0].size_bytes, 60u);
  EXPECT_EQ(header.tensors[1].type, GgmlType::F16);
  EXPECT_EQ(header.tensors[1].offset, header.data_begin + 64);
  EXPECT_EQ(header.tensors[2].type, GgmlType::I32);
  EXPECT_EQ(header.tensors[3].type, GgmlType::Q8_0);
  EXPECT_THAT(header.tensors[3].shape, ElementsAre(3, 64));
  EXPECT_EQ(header.tensors[3].size_bytes, 3u * 2 * 34);
  EXPECT_EQ(header.tensors[4].type, GgmlType::Q4_K);
  EXPECT_EQ(header.tensors[5].type, GgmlType::BF16);
  EXPECT_THAT(header.tensors[5].shape, ElementsAre(2, 3));

  // The same from the file's bytes.
  std::string bytes = read_text(fixture("gguf_metadata.gguf"));
  EXPECT_EQ(parse_gguf_header(std::as_bytes(std::span(bytes)), bytes.size(), "f").tensors.size(),
            6u);
}

TEST(Gguf, AcceptsWhatOthersWrite) {
  EXPECT_TRUE(parse(Bytes().begin(0, 0).out, 0).tensors.empty());
  // Version 2, an alignment, tensors in another order, five dimensions, a scalar, an empty tensor,
  // bytes that belong to none.
  Bytes bytes;
  bytes.begin(4, 1, 2).key("general.alignment", kU32).number<uint32_t>(64);
  bytes.tensor("second", {2, 1, 1, 3, 2}, kF32, 128).tensor("first", {}, kF32, 0);
  bytes.tensor("empty", {0, 3}, kF32, 64).tensor("third", {64}, kQ4_0, 192);
  GgufHeader header = parse(bytes.out, 192 + 36 + 28, 64);
  EXPECT_EQ(header.version, 2u);
  EXPECT_EQ(header.data_begin % 64, 0u);
  ASSERT_EQ(header.tensors.size(), 4u);
  EXPECT_EQ(header.tensors[0].name, "first");
  EXPECT_EQ(header.tensors[0].size_bytes, 4u);
  EXPECT_EQ(header.tensors[1].name, "empty");
  EXPECT_THAT(header.tensors[2].shape, ElementsAre(2, 3, 1, 1, 2));
  EXPECT_EQ(header.tensors[2].offset, header.data_begin + 128);
  EXPECT_EQ(header.tensors[3].size_bytes, 36u);
}

struct BadHeader {
  const char* what;
  std::string header;
  uint64_t data_bytes;
  std::vector<std::string> message;  // parts that must be in it
};

void PrintTo(const BadHeader& bad, std::ostream* out) {
  *out << bad.what;
}

class GgufBad : public testing::TestWithParam<BadHeader> {};

TEST_P(GgufBad, IsRefusedWithAReason) {
  const BadHeader& bad = GetParam();
  std::string message = error_of<FormatError>([&] {
    parse_gguf_header(std::as_bytes(std::span(bad.header)), bad.header.size() + bad.data_bytes,
                      "f.gguf");
  });
  EXPECT_THAT(message, HasSubstr("f.gguf"));
  for (const std::string& part : bad.message) EXPECT_THAT(message, HasSubstr(part));
}

std::string padded(Bytes bytes) {
  bytes.out.resize((bytes.out.size() + 31) / 32 * 32);
  return bytes.out;
}
std::string one(const std::vector<uint64_t>& dims, uint32_t type, uint64_t offset) {
  return padded(Bytes().begin(1, 0).tensor("w", dims, type, offset));
}
std::string two(uint64_t first, uint64_t second) {
  return padded(Bytes().begin(2, 0).tensor("v", {16}, kF32, first).tensor("w", {16}, kF32, second));
}
std::string alignment(uint32_t type, uint64_t value) {
  return padded(Bytes().begin(0, 1).key("general.alignment", type).number(value));
}
// `n` bytes of zeros follow, so that a claim is not refused for the file's size alone.
std::string with_zeros(Bytes bytes, size_t n) {
  return bytes.out + std::string(n, '\0');
}

const BadHeader kBad[] = {
    {"empty file", "", 0, {"magic", "truncated"}},
    {"another magic", std::string("GGML") + std::string(60, '\0'), 0, {"not a GGUF file"}},
    {"no version", "GGUF", 0, {"version", "truncated"}},
    {"version 1", Bytes().begin(0, 0, 1).out, 0, {"version is 1", "2 or 3"}},
    {"version 4", Bytes().begin(0, 0, 4).out, 0, {"version is 4"}},
    {"big-endian", Bytes().begin(0, 0, 3u << 24).out, 0, {"big-endian"}},
    {"no counts", "GGUF\x03" + std::string(3, '\0'), 0, {"number of tensors", "truncated"}},
    {"tensor count", Bytes().begin(1000, 0).out, 0, {"number of tensors of 1000", "truncated"}},
    {"tensor count overflows", Bytes().begin(UINT64_MAX, 0).out, 0, {"number of tensors"}},
    {"value count", Bytes().begin(0, 1ull << 61).out, 0, {"number of metadata values"}},
    {"count beyond the header limit",
     Bytes().begin(0, 1ull << 30).out,
     1ull << 40,
     {"longer than 64 MiB"}},
    {"header not there", Bytes().begin(0, 1).out, 100, {"only the first 24 bytes"}},
    {"key too long",
     with_zeros(Bytes().begin(0, 1).number<uint64_t>(70000), 80000),
     0,
     {"a metadata key is of 70000 bytes, expected at most 65535"}},
    {"key cut",
     with_zeros(Bytes().begin(0, 1).number<uint64_t>(500), 20),
     0,
     {"a metadata key needs 500 bytes", "truncated"}},
    {"key twice",
     Bytes().begin(0, 2).key("k", kBool).number<uint8_t>(0).key("k", kBool).number<uint8_t>(0).out,
     0,
     {"\"k\" occurs twice"}},
    {"value type", padded(Bytes().begin(0, 1).key("k", 13)), 0, {"\"k\"", "value type 13"}},
    {"array element type",
     padded(Bytes().begin(0, 1).key("k", kArray).number<uint32_t>(99).number<uint64_t>(0)),
     0,
     {"\"k\"", "value type 99"}},
    {"array of arrays",
     padded(Bytes().begin(0, 1).key("k", kArray).number(kArray).number<uint64_t>(0)),
     0,
     {"\"k\"", "array of arrays"}},
    {"array count",
     padded(Bytes().begin(0, 1).key("k", kArray).number(kU32).number<uint64_t>(1ull << 62)),
     0,
     {"\"k\" is an array of 4611686018427387904", "truncated"}},
    {"array beyond the header limit",
     padded(Bytes().begin(0, 1).key("k", kArray).number(kU32).number<uint64_t>(1ull << 25)),
     1ull << 30,
     {"longer than 64 MiB"}},
    {"string length",
     padded(Bytes().begin(0, 1).key("k", kString).number<uint64_t>(1ull << 63)),
     0,
     {"k is of 9223372036854775808 bytes"}},
    {"string cut",
     Bytes().begin(0, 1).key("k", kString).number<uint64_t>(9).out,
     4,
     {"k needs 9 bytes", "truncated"}},
    {"string in an array cut",
     Bytes()
         .begin(0, 1)
         .key("k", kArray)
         .number(kString)
         .number<uint64_t>(1)
         .number<uint64_t>(9)
         .out,
     4,
     {"k needs 9 bytes"}},
    {"boolean", padded(Bytes().begin(0, 1).key("k", kBool).number<uint8_t>(2)), 0, {"boolean 2"}},
    {"boolean in an array",
     padded(Bytes()
                .begin(0, 1)
                .key("k", kArray)
                .number(kBool)
                .number<uint64_t>(1)
                .number<uint8_t>(255)),
     0,
     {"boolean 255"}},
    {"alignment zero", alignment(kU32, 0), 0, {"general.alignment", "is 0"}},
    {"alignment no power", alignment(kU32, 48), 0, {"general.alignment", "is 48", "power of two"}},
    {"alignment huge", alignment(10, 1ull << 40), 0, {"general.alignment", "power of two"}},
    {"alignment negative", alignment(11, UINT64_MAX), 0, {"general.alignment", "is -1"}},
    {"alignment a string", alignment(kString, 0), 0, {"general.alignment", "no whole number"}},
    {"name too long",
     with_zeros(Bytes().begin(1, 0).number<uint64_t>(5000), 6000),
     0,
     {"name is of 5000 bytes"}},
    {"nine dimensions",
     one({1, 1, 1, 1, 1, 1, 1, 1, 1}, kF32, 0),
     4,
     {"\"w\" has 9 dimensions, expected at most 8"}},
    {"dimension above 63 bits", one({1ull << 63}, kF32, 0), 4, {"\"w\"", "too large"}},
    {"elements overflow", one({1ull << 32, 1ull << 32}, kF32, 0), 4, {"\"w\"", "too large"}},
    {"bytes overflow", one({1ull << 62}, kF32, 0), 4, {"\"w\"", "too large"}},
    {"empty and too large", one({1ull << 40, 1ull << 40, 0}, kF32, 0), 4, {"too large"}},
    {"type unknown", one({32}, 77, 0), 128, {"\"w\"", "type 77"}},
    {"type withdrawn", one({32}, 4, 0), 128, {"\"w\"", "type 4"}},
    {"no whole blocks", one({48, 2}, kQ4_0, 0), 128, {"\"w\"", "rows of 48", "Q4_0 blocks of 32"}},
    {"no whole K blocks", one({128, 2}, kQ4_K, 0), 144, {"\"w\"", "Q4_K blocks of 256"}},
    {"scalar of blocks", one({}, kQ4_0, 0), 18, {"\"w\"", "rows of 1"}},
    {"offset not aligned", one({1}, kF32, 8), 64, {"\"w\" begins at 8", "alignment 32"}},
    {"offset past the end", one({1}, kF32, 64), 64, {"\"w\" needs 4 bytes at 64", "truncated"}},
    {"offset near 2^64", one({1}, kF32, UINT64_MAX - 31), 64, {"\"w\"", "truncated"}},
    {"data cut", one({16}, kF32, 0), 63, {"\"w\" needs 64 bytes at 0", "the file has 63"}},
    {"no data", one({16}, kF32, 0), 0, {"truncated"}},
    {"overlap", two(0, 32), 128, {"\"w\" begins at 32 and overlaps \"v\", which ends at 64"}},
    {"the same place", two(0, 0), 128, {"overlaps"}},
    {"tensor twice",
     padded(Bytes().begin(2, 0).tensor("w", {8}, kF32, 0).tensor("w", {8}, kF32, 32)),
     64,
     {"\"w\" occurs twice"}},
    {"tensor info cut", Bytes().begin(1, 0).text("weight").number<uint32_t>(2).out, 6, {"weight"}},
};

INSTANTIATE_TEST_SUITE_P(All, GgufBad, testing::ValuesIn(kBad));

// A file that ends anywhere is refused, never read past its end.
TEST(Gguf, EveryTruncationIsRefused) {
  std::string bytes = read_text(fixture("gguf_metadata.gguf"));
  GgufHeader header = parse_gguf_header(std::as_bytes(std::span(bytes)), bytes.size(), "f");
  uint64_t end = header.tensors.back().offset + header.tensors.back().size_bytes;
  TempFolder folder;
  for (uint64_t size = 0; size < end; size += size < header.data_begin ? 1 : 37) {
    auto cut = std::as_bytes(std::span(bytes)).first(size);
    EXPECT_THROW(parse_gguf_header(cut, size, "f"), FormatError) << size;
  }
  write_text(folder / "a.gguf", bytes.substr(0, end - 1));
  EXPECT_THAT(error_of<FormatError>([&] { read_gguf_header(*File::open(folder / "a.gguf")); }),
              HasSubstr((folder / "a.gguf").string()));
}

// A vocabulary larger than the window that the file is read through.
TEST(Gguf, ReadsLongArrays) {
  TempFolder folder;
  std::vector<std::string> tokens;
  for (int i = 0; i < 200000; ++i) tokens.push_back("token " + std::to_string(i * 7919));
  GgufWriter writer(folder / "a.gguf", {{"w", GgmlType::F32, {1}}},
                    {{"tokenizer.ggml.tokens", {GgufType::string, tokens}},
                     {"general.name", {GgufType::string, std::string("x")}}});
  writer.write(std::as_bytes(std::span("abcd", 4)));
  writer.finish();
  GgufHeader header = read_gguf_header(*File::open(folder / "a.gguf"));
  EXPECT_EQ(*find_value(header.metadata, "tokenizer.ggml.tokens")->as_strings(), tokens);
  EXPECT_EQ(header.tensors[0].name, "w");
}

}  // namespace
}  // namespace ferry::io
