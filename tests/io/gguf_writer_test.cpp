#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "ferry/base/error.h"
#include "ferry/io/gguf.h"
#include "temp_folder.h"

namespace ferry::io {
namespace {

using namespace ferry::testing_io;
using testing::HasSubstr;
using Entry = GgufWriter::Entry;

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

// Read and written again, the file of the gguf package is the same byte for byte.
TEST(GgufWriter, WritesAsPythonDoes) {
  const std::string path = std::string(FERRY_FIXTURES) + "/quant/gguf_metadata.gguf";
  std::string expected = read_text(path);
  GgufHeader header = read_gguf_header(*File::open(path));
  std::vector<Entry> entries;
  std::string data;
  for (const GgufTensor& tensor : header.tensors) {
    entries.push_back({tensor.name, tensor.type, tensor.shape});
    data += expected.substr(tensor.offset, tensor.size_bytes);
  }
  TempFolder folder;
  for (size_t portion : {1, 33, 10000}) {
    GgufWriter writer(folder / "a.gguf", entries, header.metadata);
    for (size_t at = 0; at < data.size(); at += portion)
      writer.write(bytes_of(std::string_view(data).substr(at, portion)));
    EXPECT_EQ(folder.entries(), portion == 1 ? 0u : 1u);  // nothing half-written has a name
    writer.finish();
    EXPECT_EQ(read_text(folder / "a.gguf"), expected);
  }
}

TEST(GgufWriter, AlignmentAndEmptyTensors) {
  TempFolder folder;
  GgufWriter writer(
      folder / "a.gguf",
      {{"e", GgmlType::F32, {0, 3}}, {"a", GgmlType::F16, {3}}, {"b", GgmlType::Q8_0, {2, 32}}},
      {{"general.alignment", {GgufType::u32, uint64_t{256}}}});
  std::string data = random_bytes(6 + 68);
  writer.write(bytes_of(data));
  writer.finish();
  GgufHeader header = read_gguf_header(*File::open(folder / "a.gguf"));
  EXPECT_EQ(header.alignment, 256u);
  std::string file = read_text(folder / "a.gguf");
  ASSERT_EQ(header.tensors.size(), 3u);
  EXPECT_EQ(header.tensors[1].name, "a");
  EXPECT_EQ(file.substr(header.tensors[1].offset, 6), data.substr(0, 6));
  EXPECT_EQ(header.tensors[2].offset, header.data_begin + 256);
  EXPECT_EQ(file.substr(header.tensors[2].offset, 68), data.substr(6));
}

TEST(GgufWriter, RefusesWhatCannotBeWritten) {
  TempFolder folder;
  auto error = [&](std::vector<Entry> entries, GgufMetadata metadata = {}) {
    return error_of<ArgumentError>(
        [&] { GgufWriter(folder / "a.gguf", std::move(entries), metadata); });
  };
  EXPECT_THAT(error({{"w", GgmlType::F32, {1}}, {"w", GgmlType::F32, {1}}}),
              HasSubstr("\"w\" occurs twice"));
  EXPECT_THAT(error({{"w", GgmlType::Q4_0, {2, 33}}}), HasSubstr("Q4_0 blocks of 32"));
  EXPECT_THAT(error({{"w", GgmlType::F32, {-1}}}), HasSubstr("negative or too large"));
  EXPECT_THAT(error({{"w", GgmlType::F32, std::vector<int64_t>(9, 1)}}),
              HasSubstr("too many dimensions"));
  EXPECT_THAT(error({}, {{"k", {GgufType::u8, uint64_t{256}}}}), HasSubstr("\"k\" does not fit"));
  EXPECT_THAT(error({}, {{"k", {GgufType::string, int64_t{1}}}}), HasSubstr("\"k\" does not fit"));
  EXPECT_THAT(error({}, {{"k", {GgufType::u8, uint64_t{1}}}, {"k", {GgufType::u8, uint64_t{1}}}}),
              HasSubstr("\"k\" occurs twice"));
  EXPECT_THAT(error({}, {{"general.alignment", {GgufType::u32, uint64_t{33}}}}),
              HasSubstr("power of two"));
  EXPECT_EQ(folder.entries(), 0u);
}

TEST(GgufWriter, TooFewAndTooManyBytes) {
  TempFolder folder;
  {
    GgufWriter writer(folder / "a.gguf", {{"w", GgmlType::F32, {2}}});
    writer.write(bytes_of("1234567"));
    EXPECT_THAT(error_of<ArgumentError>([&] { writer.finish(); }), HasSubstr("0 of 1 tensors"));
    EXPECT_THAT(error_of<ArgumentError>([&] { writer.write(bytes_of("89")); }),
                HasSubstr("1 bytes more"));
  }
  EXPECT_EQ(folder.entries(), 0u);
}

}  // namespace
}  // namespace ferry::io
