#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "ferry/base/error.h"
#include "ferry/io/safetensors.h"
#include "temp_folder.h"

namespace ferry::io {
namespace {

using namespace ferry::testing_io;
using testing::HasSubstr;
using Entry = SafetensorsWriter::Entry;

void write_in_portions(SafetensorsWriter& writer, std::string_view data, size_t portion) {
  for (size_t at = 0; at < data.size(); at += portion) {
    std::string_view part = data.substr(at, portion);
    writer.write(std::as_bytes(std::span(part.data(), part.size())));
  }
}

TEST(SafetensorsWriter, RoundTrip) {
  TempFolder folder;
  std::vector<Entry> entries = {{"b.weight", Dtype::BF16, {3, 5}},
                                {"a \"quoted\" \xc3\xa9", Dtype::U8, {7}},
                                {"scalar", Dtype::F32, {}},
                                {"empty", Dtype::I64, {0, 4}}};
  std::string data = random_bytes(30 + 7 + 4);
  for (size_t portion : {1, 8, 1000}) {
    SafetensorsWriter writer(folder / "a.st", entries, {{"format", "pt"}, {"note", "x\ny"}});
    write_in_portions(writer, data, portion);
    writer.finish();
    auto file = File::open(folder / "a.st");
    SafetensorsHeader header = read_safetensors_header(*file);
    EXPECT_EQ(header.data_begin % 8, 0u);
    EXPECT_EQ(header.metadata.at("note"), "x\ny");
    ASSERT_EQ(header.tensors.size(), entries.size());
    std::map<std::string, TensorInfo> by_name;
    for (const TensorInfo& info : header.tensors) by_name[info.name] = info;
    for (const Entry& entry : entries) {
      EXPECT_EQ(by_name.at(entry.name).shape, entry.shape);
      EXPECT_EQ(by_name.at(entry.name).dtype, entry.dtype);
    }
    EXPECT_EQ(read_text(folder / "a.st").substr(header.data_begin), data);
    EXPECT_EQ(folder.entries(), 1u);
  }
}

// Byte for byte what the format prescribes: length, JSON, spaces up to a multiple of 8.
TEST(SafetensorsWriter, KnownBytes) {
  TempFolder folder;
  SafetensorsWriter writer(folder / "a.st", {{"w", Dtype::F32, {1}}}, {});
  write_in_portions(writer, "abcd", 4);
  writer.finish();
  std::string json = R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})";
  json.append((8 - json.size() % 8) % 8, ' ');
  EXPECT_EQ(read_text(folder / "a.st"),
            std::string(1, static_cast<char>(json.size())) + std::string(7, '\0') + json + "abcd");
}

TEST(SafetensorsWriter, RandomHeaders) {
  TempFolder folder;
  std::mt19937 random(7);
  for (int round = 0; round < 20; ++round) {
    std::vector<Entry> entries;
    size_t bytes = 0;
    for (unsigned i = 0; i < random() % 20; ++i) {
      auto dtype = static_cast<Dtype>(random() % 16);
      std::vector<int64_t> shape(random() % 4);
      int64_t count = 1;
      for (int64_t& extent : shape) count *= extent = random() % 5;
      bytes += count * item_size(dtype);
      entries.push_back({"t" + std::to_string(i), dtype, shape});
    }
    std::string data = random_bytes(bytes, round);
    SafetensorsWriter writer(folder / "r.st", entries);
    write_in_portions(writer, data, 13);
    writer.finish();
    SafetensorsHeader header = read_safetensors_header(*File::open(folder / "r.st"));
    EXPECT_EQ(header.tensors.size(), entries.size());
    EXPECT_EQ(read_text(folder / "r.st").substr(header.data_begin), data);
  }
}

TEST(SafetensorsWriter, TooManyAndTooFewBytes) {
  TempFolder folder;
  {
    SafetensorsWriter writer(folder / "a.st", {{"w", Dtype::F32, {2}}});
    write_in_portions(writer, "1234567", 7);
    EXPECT_THAT(error_of<ArgumentError>([&] { writer.finish(); }),
                HasSubstr("after 7 bytes of data, expected 8"));
    EXPECT_THAT(error_of<ArgumentError>([&] { write_in_portions(writer, "89", 2); }),
                HasSubstr("at most 1 of 8"));
  }
  EXPECT_EQ(folder.entries(), 0u);
}

TEST(SafetensorsWriter, BadEntries) {
  TempFolder folder;
  auto attempt = [&](std::vector<Entry> entries) {
    return error_of<ArgumentError>([&] { SafetensorsWriter(folder / "a.st", entries); });
  };
  EXPECT_THAT(attempt({{"w", Dtype::U8, {1}}, {"w", Dtype::U8, {1}}}), HasSubstr("twice"));
  EXPECT_THAT(attempt({{"__metadata__", Dtype::U8, {1}}}), HasSubstr("reserved"));
  EXPECT_THAT(attempt({{"w", Dtype::U8, {-1}}}), HasSubstr("negative"));
  EXPECT_THAT(attempt({{"w", Dtype::F64, {1ll << 62}}}), HasSubstr("too large"));
  EXPECT_THAT(attempt({{"\xff", Dtype::U8, {1}}}), HasSubstr("UTF-8"));
  EXPECT_THROW(SafetensorsWriter(folder / "no/a.st", {}), IoError);
  EXPECT_EQ(folder.entries(), 0u);
}

}  // namespace
}  // namespace ferry::io
